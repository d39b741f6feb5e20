"""Serve a simulator: one command, one line when it is ready, and nothing left behind when it ends.

    python recipes/serve_simulator.py --model Alibaba-NLP/Simulation_LLM_google_3B_V2 --port 6001

Train against it with `--simulator_url http://127.0.0.1:6001/v1`. Ctrl-C or SIGTERM ends it. Flags that this recipe
does not know go to vLLM as they are: `--tensor-parallel-size 2 --data-parallel-size 2`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from trl import TrlParser

from zerosearch.errors import exit_on_user_error, user_mistakes
from zerosearch.serving import ServerDied, exit_on_signals, simulator_server


@dataclass
class ServeArguments:
    """What to serve and where."""

    model: str = field(metadata={"help": "Folder or Hub id of the simulator."})
    port: int = field(default=6001, metadata={"help": "Port to listen on."})  # the port of the paper's code
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 admits other machines."})
    max_model_len: int = field(default=4096, metadata={"help": "Longest prompt plus reply, in tokens."})
    dtype: str = field(default="auto", metadata={"help": "Number format; auto turns float32 weights into bfloat16."})
    num_threads: int | None = field(
        default=None, metadata={"help": "CPU only: threads to use where others work too. Default: all cores but one."}
    )


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Serve until a signal comes (exit 128 + its number) or the server dies (exit 1, with its last lines)."""
    with user_mistakes():
        parser = TrlParser(ServeArguments)
        arguments, vllm_arguments = parser.parse_args_and_config(argv, return_remaining_strings=True)
    exit_on_signals()
    print(f"starting {arguments.model} ...", flush=True)
    try:
        with simulator_server(**vars(arguments), vllm_arguments=vllm_arguments) as server:
            print(f"simulator ready at {server.base_url} after {server.startup_s:.0f} s (Ctrl-C ends it)", flush=True)
            server.wait()
    except ServerDied as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
