"""Serve a simulator: one line when it is ready, and no process left when it ends, killed or not.

    python recipes/serve_simulator.py --model Alibaba-NLP/Simulation_LLM_google_3B_V2 --port 6001
    python recipes/serve_simulator.py --model outputs/simulator-lora                   # an adapter, over its base
    python recipes/serve_simulator.py --model outputs/simulator --data-parallel-size 4

Train against it with the `--simulator_url` that it prints. Ctrl-C or SIGTERM ends it. Flags that this recipe does not
know go to vLLM as they are: replicas on several GPUs (above), `--tensor-parallel-size 2`, further adapters by
`--enable-lora --lora-modules google=outputs/lora`, `--no-enable-prefix-caching`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from zerosearch.command_line import exit_on_user_error, parse, say
from zerosearch.simulator.server import exit_on_signals, simulator_server


@dataclass
class ServeArguments:
    """What to serve and where."""

    model: str = field(metadata={"help": "Folder or Hub id of the simulator; or the folder of a LoRA adapter."})
    port: int = field(default=6001, metadata={"help": "Port to listen on."})  # the port of the paper's code
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 admits other machines."})
    max_model_len: int = field(default=4096, metadata={"min": 1, "help": "Longest prompt plus reply, in tokens."})
    dtype: str = field(default="auto", metadata={"help": "Number format; auto turns float32 weights into bfloat16."})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Serve until a signal comes (exit 128 + its number) or the server dies (exit 2, with its last lines)."""
    arguments, vllm_arguments = parse(ServeArguments, argv=argv, rest=True)
    exit_on_signals()
    say(f"starting {arguments.model} ...")
    with simulator_server(**vars(arguments), vllm_arguments=vllm_arguments) as server:
        say(f"simulator ready at {server.base_url} (Ctrl-C ends it)")
        server.wait()


if __name__ == "__main__":
    main()
