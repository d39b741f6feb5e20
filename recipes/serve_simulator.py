"""Serve a simulator: one line when it is ready, and no process left when it ends, killed or not.

    python recipes/serve_simulator.py --model Alibaba-NLP/Simulation_LLM_google_3B_V2 --port 6001
    python recipes/serve_simulator.py --model outputs/simulator-lora                       # an adapter, over its base
    python recipes/serve_simulator.py --model Qwen/Qwen2.5-3B-Instruct --adapter google=outputs/lora wiki=outputs/lora2
    python recipes/serve_simulator.py --model outputs/simulator --replicas 4               # ports 6001 to 6004

Train against it with the `--simulator_url` that it prints. Ctrl-C or SIGTERM ends it. Replicas share the GPUs, or the
cores, evenly between them. Flags that this recipe does not know go to vLLM as they are: `--tensor-parallel-size 2`.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.errors import UserError
from zerosearch.simulator.server import ServerDied, exit_on_signals, simulator_servers, wait_for_end


@dataclass
class ServeArguments:
    """What to serve and where."""

    model: str = field(metadata={"help": "Folder or Hub id of the simulator; or the folder of a LoRA adapter."})
    port: int = field(default=6001, metadata={"help": "Port to listen on."})  # the port of the paper's code
    replicas: int = field(default=1, metadata={"min": 1, "help": "Servers, on this port and those after it."})
    adapter: list[str] = field(default_factory=list, metadata={"help": "LoRA adapters to serve as well: name=folder."})
    prefix_caching: bool = field(default=True, metadata={"help": "Keep what prompts begin with."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 admits other machines."})
    max_model_len: int = field(default=4096, metadata={"min": 1, "help": "Longest prompt plus reply, in tokens."})
    dtype: str = field(default="auto", metadata={"help": "Number format; auto turns float32 weights into bfloat16."})
    num_threads: int | None = field(
        default=None,
        metadata={"min": 1, "help": "CPU only: threads to use. Default: all cores but one."},
    )


def adapters_of(pairs: list[str]) -> dict[str, str]:
    """Read adapters, "name=folder" each."""
    adapters = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder) or name in adapters:
            raise UserError(f"--adapter is {pair!r}: it must be name=folder, each name once")
        adapters[name] = folder
    return adapters


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Serve until a signal comes (exit 128 + its number) or the server dies (exit 1, with its last lines)."""
    arguments, vllm_arguments = parse(ServeArguments, argv=argv, rest=True)
    settings = vars(arguments)
    settings["adapters"] = adapters_of(settings.pop("adapter"))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    exit_on_signals()
    print(f"starting {arguments.model} ...", flush=True)
    try:
        with simulator_servers(**settings, vllm_arguments=vllm_arguments) as servers:
            urls = ",".join(server.base_url for server in servers)
            seconds = max(server.startup_s for server in servers)
            print(f"simulator ready at {urls} after {seconds:.0f} s (Ctrl-C ends it)", flush=True)
            wait_for_end(servers)
    except ServerDied as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
