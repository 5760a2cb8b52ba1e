r"""Chat templates with a name, for models that have none of their own: mostly base models.

    chatml    <|im_start|>user\n...<|im_end|>\n
    gemma     <start_of_turn>user\n...<end_of_turn>\n
    gemma4    <|turn>user\n...<turn|>\n
    llama3    <|start_header_id|>user<|end_header_id|>\n\n...<|eot_id|>
    zephyr    <|user|>\n...</s>\n, where </s> is the tokenizer's own end token

The forms are those of OpenAI's ChatML and of the models google/gemma-3-1b-it,
google/gemma-4-E2B-it, meta-llama/Meta-Llama-3-8B-Instruct and HuggingFaceH4/zephyr-7b-beta; the
programs were written here. All but zephyr need the token at the end of a turn in the vocabulary, as
a special token: the base models of Qwen, Gemma and Llama 3 have it. zephyr fits every tokenizer
that has an end token. None of them knows tools.
"""

NAMED_TEMPLATES = {
    "chatml": """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "gemma": """\
{{- bos_token }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content + '\\n\\n' %}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\\n' + (system if loop.first else '') }}
{{- (message.content or '') | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
""",
    "gemma4": """\
{{- bos_token }}
{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<|turn>' + role + '\\n' + (message.content or '') | trim + '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\\n' }}{%- endif %}
""",
    "llama3": """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- (message.content or '') | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "zephyr": """\
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + (message.content or '') + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
""",
}
