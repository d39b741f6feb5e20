"""Give TinyWorld's policy what TRL's own tool loop asks for: its searches become calls of a tool, tags and all.

    python recipes/tinyworld_tools.py --output_dir outputs/tinyworld-tools
    python recipes/trl_environment.py --config recipes/configs/trl-tinyworld.yaml

The weights stay as they are. The chat template writes a call of `search` as `<search> query </search>` and its reply
as the documents that the policy knows; the response template reads the call; a closing tag ends the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from zerosearch.command_line import exit_on_user_error, parse
from zerosearch.environment import TAGS_AS_CALLS
from zerosearch.files import claim_output_dir
from zerosearch.generation.loading import load_model, load_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ '\n\n<information>' + message.content + '</information>\n\n' }}"
    "{% else %}{{ message.content }}{% for call in message.tool_calls or [] %}"
    "{% if call.function.name == 'search' and call.function.arguments.query is defined %}"
    " <search> {{ call.function.arguments.query }} </search>"
    "{% else %} <search> {{ call.function | tojson }} </search>{% endif %}"  # so that TRL sees that calls are written
    "{% endfor %}{% endif %}{% endfor %}"
)
RESPONSE_TEMPLATE = {
    **TAGS_AS_CALLS,
    "start_anchor_pattern": r"Question: [^\n]*\n|</information>\n\n",
}


@dataclass
class ToolsArguments:
    """What to start from, and where the result goes."""

    model: str = field(default="data/tinyworld/policy", metadata={"help": "A policy of TinyWorld's."})
    output_dir: str = field(default="outputs/tinyworld-tools", metadata={"help": "Folder; must be new or empty."})


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Write the policy with its templates and ends of sequence."""
    (arguments,) = parse(ToolsArguments, argv=argv)
    tokenizer, model = load_tokenizer(arguments.model), load_model(arguments.model)
    output_dir = claim_output_dir(Path(arguments.output_dir))
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    closing = [tokenizer(f" </{tag}>")["input_ids"][0] for tag in ("search", "answer")]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *closing]
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    main()
