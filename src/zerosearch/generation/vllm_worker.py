"""What the worker of a vLLM server needs to take the policy's weights from a file, which `vllm_server` sends.

Only a server imports this: `--worker-extension-cls zerosearch.generation.vllm_worker.PolicyWeights`. That happens
before the model is loaded, and from then on vLLM multiplies by the weights that are replaced later.
"""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file

from zerosearch.generation.vllm_workarounds import multiply_by_adapters_in_groups, multiply_by_weights_in_place

multiply_by_weights_in_place()
multiply_by_adapters_in_groups()


class PolicyWeights:
    """A base class that vLLM adds to its worker's."""

    model_runner: Any

    def load_policy_weights(self, path: str) -> None:
        """Replace the weights by those of a safetensors file, under the names of the checkpoint."""
        self.model_runner.model.load_weights(iter(load_file(path).items()))
        self.model_runner.reset_lora_state()
