"""Chat templates in the shapes that the models' own pages document, written for these tests.

Each family writes turns between its own marks, and has its own idea of what a system message, a
tool or a reasoning is. The generation tags mark what transformers' assistant mask counts.
"""

# <|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|>, after a system turn with the date
LLAMA3 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content | trim %}
  {%- set messages = messages[1:] %}
{%- else %}
  {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}
{%- if tools %}
  {{- 'Tools:\\n' }}
  {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
  {%- if message.role not in ('user', 'assistant', 'tool') %}
    {{- raise_exception('unknown role') }}
  {%- endif %}
  {%- set role = 'ipython' if message.role == 'tool' else message.role %}
  {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}
      {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": ' + call.name | tojson + ', "parameters": ' }}
        {{- call.arguments | tojson + '}' }}
      {%- else %}
        {{- message.content | trim }}
      {%- endif %}
      {{- '<|eot_id|>' }}
    {%- endgeneration %}
  {%- else %}
    {{- message.content | trim + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# ChatML: <|im_start|>role\ncontent<|im_end|>\n; a default system turn; tools in XML
QWEN25 = """
{%- set system = messages[0].content if messages[0].role == 'system' else 'You are helpful.' %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
  {{- '\\n\\n# Tools\\n\\n<tools>' }}
  {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
  {{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- generation %}
      {{- message.content or '' }}
      {%- for call in message.tool_calls or [] %}
        {{- '\\n' if message.content or not loop.first }}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
      {%- endfor %}
      {{- '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
  {%- elif message.role != 'system' or not loop.first %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# <start_of_turn>model\ncontent<end_of_turn>\n; no system turn: it opens the first user's
GEMMA3 = """
{{- bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
  {%- set first = messages[0].content + '\\n\\n' %}
  {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('roles must alternate') }}
  {%- endif %}
  {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{- message.content | trim + '<end_of_turn>' }}{%- endgeneration %}
  {%- else %}
    {{- (first if loop.first else '') + message.content | trim + '<end_of_turn>' }}
  {%- endif %}
  {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

# <s>[INST] user [/INST] assistant</s>; the system message opens the first user's, the tools stand
# before the last one's
MISTRAL = """
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
  {%- set system = messages[0].content + '\\n\\n' %}
  {%- set messages = messages[1:] %}
{%- endif %}
{%- set question = messages | selectattr('role', 'equalto', 'user') | list | last %}
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {%- if tools and message == question %}
      {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {{- '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' }}
  {%- elif message.role == 'assistant' %}
    {%- generation %}
      {%- if message.tool_calls %}
        {{- '[TOOL_CALLS] ' + message.tool_calls | map(attribute='function') | list | tojson }}
      {%- else %}
        {{- ' ' + message.content | trim }}
      {%- endif %}
      {{- eos_token }}
    {%- endgeneration %}
  {%- elif message.role == 'tool' %}
    {{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
  {%- else %}
    {{- raise_exception('only user, assistant and tool') }}
  {%- endif %}
{%- endfor %}
"""

# Qwen 3: as 2.5, and of the turns before the last question the reasoning is left out
QWEN3 = """
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
  {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {%- set content = message.content or '' %}
    {%- set reasoning = message.reasoning_content or '' %}
    {%- if '</think>' in content %}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}
      {%- set content = content.split('</think>')[-1].lstrip() %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
      {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in message.tool_calls or [] %}
      {{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {{- '<|im_end|>\\n' }}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# DeepSeek R1: generation starts in a thought, which no finished turn shows
R1 = """
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'user' %}{{- '<|User|>' + message.content }}
  {%- else %}
    {{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}
"""

# Phi-4-mini: <|role|>content<|end|>; a text that goes on with no header ends with the end token
PHI4 = """
{%- for message in messages %}
  {%- if message.role == 'tool' %}
    {{- '<|tool_response|>' + message.content | tojson + '<|end|>' }}
  {%- else %}
    {{- '<|' + message.role + '|>' }}
    {%- if message.role == 'assistant' %}
      {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
          {{- '<|tool_call|>' + call.function | tojson + '<|/tool_call|>' }}
        {%- endfor %}
        {{- '<|end|>' }}
      {%- endgeneration %}
    {%- else %}
      {{- message.content }}
      {%- if message.role == 'system' and tools %}
        {{- '<|tool|>' + tools | tojson + '<|/tool|>' }}
      {%- endif %}
      {{- '<|end|>' }}
    {%- endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}
{%- else %}{%- generation %}{{- eos_token }}{%- endgeneration %}
{%- endif %}
"""

# OLMo 3: ChatML whose last answer ends with the end token in the place of <|im_end|>; the functions
# stand in the system turn
OLMO3 = """
{%- if messages[0].role != 'system' %}
  {{- '<|im_start|>system\\nYou are Olmo. <functions></functions><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    {%- generation %}
      {{- message.content or '' }}
      {%- if message.tool_calls %}
        {{- '<function_calls>' }}
        {%- for call in message.tool_calls %}
          {{- call.function.name + '(' + call.function.arguments | tojson + ')' }}
        {%- endfor %}
        {{- '</function_calls>' }}
      {%- endif %}
      {{- '<|im_end|>' if not loop.last else eos_token }}
    {%- endgeneration %}
    {{- '\\n' if not loop.last }}
  {%- else %}
    {%- set role = 'environment' if message.role == 'tool' else message.role %}
    {{- '<|im_start|>' + role + '\\n' + message.content }}
    {%- if role == 'system' %}
      {{- ' <functions>' + (tools | tojson if tools else '') + '</functions>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Granite: <|start_of_role|>role<|end_of_role|>content<|end_of_text|>\n; tools have a role
GRANITE = """
{%- if messages[0].role != 'system' %}
  {{- '<|start_of_role|>system<|end_of_role|>Today: ' + strftime_now('%B %d, %Y') }}
  {{- '.<|end_of_text|>\\n' }}
{%- endif %}
{%- if tools %}
  {{- '<|start_of_role|>available_tools<|end_of_role|>' + tools | tojson(indent=4) }}
  {{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}
      {{- message.content or '' }}
      {%- if message.tool_calls %}
        {{- '<|tool_call|>' + message.tool_calls | map(attribute='function') | list | tojson }}
      {%- endif %}
      {{- '<|end_of_text|>' }}
    {%- endgeneration %}
  {%- else %}
    {{- message.content + '<|end_of_text|>' }}
  {%- endif %}
  {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}
"""

# SmolLM3: ChatML with the date; with enable_thinking false each answer starts behind an empty
# thought, which the header shows
SMOLLM3 = """
{%- set think = enable_thinking | default(true) %}
{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\nReasoning Mode: ' }}
{{- ('/think' if think else '/no_think') + '\\n\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- if tools %}{{- '<tools>' + tools | tojson + '</tools>' }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' + ('' if think else '<think>\\n\\n</think>\\n') }}
    {%- generation %}
      {{- message.content or '' }}
      {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
      {%- endfor %}
      {{- '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\\n' }}
  {%- elif message.role != 'system' %}
    {%- set role = 'user' if message.role == 'tool' else message.role %}
    {{- '<|im_start|>' + role + '\\n' + message.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' + ('' if think else '<think>\\n\\n</think>\\n') }}
{%- endif %}
"""

# Ministral 3: Mistral's marks without spaces; a call names its function, then [ARGS]; a thought is
# a chunk of the content
MINISTRAL3 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
  {{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {{- '[INST]' + message.content + '[/INST]' }}
  {%- elif message.role == 'tool' %}
    {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
  {%- elif message.role == 'assistant' %}
    {%- generation %}
      {%- if message.content is string %}{{- message.content }}
      {%- else %}
        {%- for block in message.content or [] %}
          {{- block.text if block.type == 'text' else '[THINK]' + block.thinking + '[/THINK]' }}
        {%- endfor %}
      {%- endif %}
      {%- for call in message.tool_calls or [] %}
        {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
      {%- endfor %}
      {{- eos_token }}
    {%- endgeneration %}
  {%- endif %}
{%- endfor %}
"""

SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen25": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "gemma3": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": [
        "<s>",
        "</s>",
        *(f"[{slash}{name}]" for name in ("INST", "AVAILABLE_TOOLS") for slash in ("", "/")),
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "r1": ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"],
}
BOS_EOS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen25": (None, "<|im_end|>"),
    "gemma3": ("<bos>", "<eos>"),
    "mistral": ("<s>", "</s>"),
    "qwen3": (None, "<|im_end|>"),
    "r1": ("<|begin|>", "<|end|>"),
}
TEMPLATES = {
    "llama3": LLAMA3,
    "qwen25": QWEN25,
    "gemma3": GEMMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "r1": R1,
}
NEWER = {
    "phi4": PHI4,
    "olmo3": OLMO3,
    "granite": GRANITE,
    "smollm3": SMOLLM3,
    "ministral3": MINISTRAL3,
}
"""Those of families whose tests need no tokenizer of their own."""
