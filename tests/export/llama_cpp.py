"""llama.cpp itself, through the C functions in xllamacpp's extension module.

Its structs of parameters change from version to version. They are passed as blobs that llama.cpp
fills itself; a few numbers in them are set at known places, where the defaults are checked first.
"""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

# places of int32 numbers in the parameters of a context -> (the default there, what tests want)
CONTEXT = {
    0: (512, 256),  # n_ctx
    2: (512, 256),  # n_ubatch, of so many tokens
    13: (-1, 0),  # flash attention: off, it computes in fp16
    26: (1, 0),  # keys as fp32
    27: (1, 0),  # values as fp32
}


class _Blob(ctypes.Structure):
    _fields_ = [("ints", ctypes.c_int32 * 128)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SAID: list[str] = []
_keep = _LOG(lambda level, text, data: _SAID.append(text.decode(errors="replace")))
_LOADED: list[ctypes.CDLL] = []


def library() -> ctypes.CDLL:
    """Return llama.cpp's functions, declared."""
    if _LOADED:
        return _LOADED[0]
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        pytest.skip("xllamacpp is not installed")
    [file] = Path(next(iter(spec.submodule_search_locations))).glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(file))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, *arguments in [
        ("llama_log_set", None, _LOG, pointer),
        ("llama_model_default_params", _Blob),
        ("llama_context_default_params", _Blob),
        ("llama_model_load_from_file", pointer, ctypes.c_char_p, _Blob),
        ("llama_init_from_model", pointer, pointer, _Blob),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", number, pointer),
        ("llama_vocab_is_eog", ctypes.c_bool, pointer, number),
        ("llama_batch_init", _Batch, number, number, number),
        ("llama_batch_free", None, _Batch),
        ("llama_decode", number, pointer, _Batch),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, number),
        ("llama_adapter_lora_init", pointer, pointer, ctypes.c_char_p),
        ("llama_free", None, pointer),
        ("llama_model_free", None, pointer),
    ]:
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    ids = ctypes.POINTER(number)
    lib.llama_tokenize.argtypes = [pointer, ctypes.c_char_p, number, ids, number]
    lib.llama_tokenize.argtypes += [ctypes.c_bool, ctypes.c_bool]
    adapters, scales = ctypes.POINTER(pointer), ctypes.POINTER(ctypes.c_float)
    lib.llama_set_adapters_lora.argtypes = [pointer, adapters, ctypes.c_size_t, scales]
    lib.llama_log_set(_keep, None)
    lib.llama_backend_init()
    _LOADED.append(lib)
    return lib


class LlamaCpp:
    """A file as llama.cpp computes it, in fp32, with an adapter's file if there is one."""

    def __init__(self, path: Path, adapter: Path | None = None):
        self.lib = library()
        _SAID.clear()
        params = self.lib.llama_model_default_params()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, "".join(_SAID[-20:])
        self.adapter = None
        if adapter is not None:
            self.adapter = self.lib.llama_adapter_lora_init(self.model, str(adapter).encode())
            assert self.adapter, "".join(_SAID[-20:])
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.lib.llama_model_free(self.model)

    def logits(self, ids) -> torch.Tensor:
        """Return the logits at each position, fp32 [T, V]."""
        params = self.lib.llama_context_default_params()
        for place, (default, wanted) in CONTEXT.items():
            assert params.ints[place] == default, f"the parameters have moved: {place}"
            params.ints[place] = wanted
        context = self.lib.llama_init_from_model(self.model, params)
        if self.adapter is not None:
            adapters, scales = (ctypes.c_void_p * 1)(self.adapter), (ctypes.c_float * 1)(1.0)
            assert self.lib.llama_set_adapters_lora(context, adapters, 1, scales) == 0
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert self.lib.llama_decode(context, batch) == 0
        rows = [
            np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context, i), (self.size,)).copy()
            for i in range(len(ids))
        ]
        self.lib.llama_batch_free(batch)
        self.lib.llama_free(context)
        return torch.from_numpy(np.stack(rows))

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text that may hold special tokens."""
        data = text.encode()
        found = (ctypes.c_int32 * (len(data) + 16))()
        n = self.lib.llama_tokenize(self.vocab, data, len(data), found, len(found), True, True)
        assert n >= 0
        return list(found[:n])

    def ends(self) -> set[int]:
        """Return the tokens at which generation stops."""
        return {i for i in range(self.size) if self.lib.llama_vocab_is_eog(self.vocab, i)}
