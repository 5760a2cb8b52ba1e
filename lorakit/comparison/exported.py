"""Size and speed of a model as a GGUF file, by quantization.

The file is written, measured and removed. Its size does not depend on what was learned, so one run
of each model stands for all. The speed is that of decoding one text of NEW tokens after a short
prompt, the prompt not counted: by llama.cpp itself if the package xllamacpp is installed, else by
lorakit, which reads the same blocks.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.comparison.record import fingerprint
from lorakit.comparison.work import Job
from lorakit.config.comparison import ComparisonConfig
from lorakit.config.errors import LorakitError
from lorakit.export.gguf import export_gguf
from lorakit.export.runtime import continue_in_llama_cpp
from lorakit.export.sample import TEXTS
from lorakit.files.local import as_path, read_json, write_json
from lorakit.inference.generate import continue_text
from lorakit.inference.sampling import Sampling
from lorakit.models.load import load_model
from lorakit.models.tokenizer_files import load_tokenizer

FILE = "exports.json"
NEW = 48
_PROMPT = 16


def measure_exports(
    jobs: Sequence[Job], say: Callable[[str], None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure size and speed of each model by quantization, and return what `known_exports` does.

    A model is left out until one of its runs is finished. One that cannot be exported has an
    "error", and is tried again by the next call.
    """
    config, folder = jobs[0].config, jobs[0].folder
    path = folder / FILE
    known = read_json(path) if path.exists() else {}
    for model, place in config.models.items():
        finished = [job for job in jobs if job.run.model == model]
        finished = [job for job in finished if job.record.state == "finished"]
        trained = [job for job in finished if job.run.is_trained] or finished
        for name in config.exports if trained else []:
            key = f"{fingerprint(place)} {name}"
            if key not in known or "error" in known[key]:
                say(f"exporting {model} as {name}")
                known[key] = _measured(trained[0], name, folder)
                write_json(path, known)
    return known_exports(config)


def known_exports(config: ComparisonConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the size and the speed of each model by quantization, where exports.json has them."""
    path = as_path(config.output_dir) / FILE
    known = read_json(path) if path.exists() else {}
    keys = {
        model: {name: f"{fingerprint(place)} {name}" for name in config.exports}
        for model, place in config.models.items()
    }
    return {
        model: {name: known[key] for name, key in of_model.items() if key in known}
        for model, of_model in keys.items()
    }


def _measured(job: Job, quantization: str, folder: Path) -> dict[str, Any]:
    """Return the size and the speed of a run's model in one quantization."""
    run = job.run
    source: dict[str, Any] = {"model": run.config.model}
    if run.is_trained:
        full = run.config.train.train == "full"
        source |= {"model": run.folder} if full else {"adapter": run.folder}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        file = Path(temporary) / "model.gguf"
        try:
            size = export_gguf(file=file, quantization=quantization, **source).size
            speed, by = _speed(file)
        except LorakitError as error:
            return {"error": str(error)}
    threads = torch.get_num_threads()
    return {"bytes": size, "tokens_per_second": speed, "measured_by": by, "threads": threads}


def _speed(file: Path) -> tuple[float | None, str]:
    """Return how fast a file is decoded, in tokens per second, and by what."""
    prompt = load_tokenizer(file).encode(TEXTS[0])[:_PROMPT]
    threads = torch.get_num_threads()
    run = continue_in_llama_cpp(file, [prompt, prompt], [], NEW, threads)
    if not isinstance(run, str):
        return run.tokens_per_second[-1], "llama.cpp"  # the first text reads the weights
    model = load_model(file, dtype="bfloat16" if torch.cuda.is_available() else "float32")
    model.eval()
    with torch.no_grad():
        times = [time.perf_counter() for _ in continue_text(model, [prompt], NEW, Sampling(), None)]
    took = times[-1] - times[0]
    return (len(times) - 1) / took if took > 0 else None, "lorakit"
