"""llama.cpp as a user runs it: its server, prebuilt in the package xllamacpp, reading a GGUF file."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """A running server; loopback only."""

    def __init__(self, path: Path, context: int = 128) -> None:
        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx = context
        options.n_parallel = 1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.warmup = False
        options.port = 0
        options.hostnames = ["127.0.0.1"]
        # float32 throughout, so that nothing but the file decides what comes out
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(options)

    def ask(self, path: str, **content: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The tokens that follow, the most probable each time."""
        answer = self.ask(
            "/completion", prompt=ids, n_predict=count, temperature=0.0, return_tokens=True, cache_prompt=False
        )
        return answer["tokens"]

    def log_probability(self, ids: list[int], following: int) -> float:
        """Logarithm of the probability that the model gives to one token after others."""
        answer = self.ask(
            "/completion",
            prompt=ids,
            n_predict=1,
            n_probs=1,
            temperature=0.0,
            logit_bias=[[following, 1000.0]],
            return_tokens=True,
            cache_prompt=True,
        )
        assert answer["tokens"] == [following]
        return answer["completion_probabilities"][0]["logprob"]

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        return self.ask("/tokenize", content=text, add_special=False)["tokens"]
