"""`lorakit generate`: the prompt from an argument or from standard input."""

import subprocess
import sys

import lorakit as lk


def test_prompt_from_standard_input(tiny_dir):
    command = [
        sys.executable,
        "-m",
        "lorakit.cli",
        "generate",
        str(tiny_dir),
        "--max-new-tokens",
        "3",
    ]
    done = subprocess.run(command, input="hello", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tok = lk.load_model(tiny_dir), lk.load_tokenizer(tiny_dir)
    assert done.stdout == lk.generate(model, tok, "hello", max_new_tokens=3) + "\n"
