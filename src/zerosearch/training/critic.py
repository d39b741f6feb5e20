"""PPO's value model: the policy's base weights under a head of one number, with an optimizer of its own.

TRL gathers, saves and sends to vLLM whatever the policy's prepared model holds, by name. So the critic is prepared
apart, as TRL prepares the reference model: with DeepSpeed in its own engine, whose ZeRO-3 shards parameters, gradients
and optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zerosearch.errors import UserError
from zerosearch.training.advantages import masked_gae, token_rewards, whiten
from zerosearch.training.micro_batches import policy_mask, trimmed_parts, whole

if TYPE_CHECKING:
    from accelerate import Accelerator

    from zerosearch.training.config import SearchConfig


class Critic:
    """Estimate the reward still to come before each policy token, and learn from what came."""

    def __init__(self, base: str, model_options: dict[str, Any], args: SearchConfig, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.updates = 0
        model = value_model(base, model_options)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        # As the policy's: AdamW, no decay for biases and norms.
        matrices = [parameter for name, parameter in model.named_parameters() if _decays(name)]
        others = [parameter for name, parameter in model.named_parameters() if not _decays(name)]
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=args.critic_learning_rate)
        self.deepspeed = accelerator.state.deepspeed_plugin is not None
        if self.deepspeed:
            self.model, self.optimizer = self._deepspeed_engine(model, optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare_model(model), optimizer

    def _deepspeed_engine(self, model: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        import deepspeed  # here, for the reason TRL gives: https://github.com/deepspeedai/DeepSpeed/issues/7252
        from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

        config = deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        # What the policy alone decides, and what is filled in for its shape only.
        config = {name: value for name, value in config.items() if name not in ("optimizer", "scheduler")}
        config = {name: value for name, value in config.items() if value != "auto" and name != "train_batch_size"}
        zero = {name: value for name, value in config["zero_optimization"].items() if value != "auto"}
        config |= {
            "zero_optimization": zero,
            "gradient_clipping": self.args.max_grad_norm,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "train_micro_batch_size_per_gpu": self.args.per_device_train_batch_size,
        }
        if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
            optimizer = map_pytorch_optim_to_deepspeed(optimizer)
        engine, wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return engine, wrapped

    def values(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        scored: torch.Tensor,
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """Return the value of the state before each token under `scored`, (B, P + C) and (B, C) to (B, C); else 0."""
        width = scored.shape[1]
        prompt_length = input_ids.shape[1] - width
        values = torch.zeros(scored.shape, device=input_ids.device)
        for part in trimmed_parts(attention_mask, scored, batch_size):
            columns = slice(part.start, part.end)
            mask = attention_mask[part.rows, columns]
            with self.accelerator.autocast():
                states = self.model(
                    input_ids=input_ids[part.rows, columns], attention_mask=mask, use_cache=False
                ).logits  # (b, end - start, 1)
            # The state before a token is the position before it.
            kept = states[:, prompt_length - part.start - 1 : -1, 0].float()  # (b, end - prompt_length)
            values = values.index_put((part.rows,), torch.nn.functional.pad(kept, (0, width - kept.shape[1])))
        return values * scored

    @torch.no_grad()
    def advantages(
        self, batch: dict[str, torch.Tensor], rewards: torch.Tensor, logps: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Return advantages, values and returns (n, C) of this rank's batch, and what is logged of all ranks'.

        `rewards` (n,) are those of the trajectories, `logps` (n, C) the policy's log-probabilities. The advantages are
        whitened over the policy tokens of all ranks.
        """
        mask, ref_logps = policy_mask(batch), batch.get("ref_per_token_logps")
        values = self.values(*whole(batch), mask, self.args.per_device_train_batch_size)
        paid = token_rewards(rewards, mask, logps, ref_logps, self.args.beta)
        advantages, returns = masked_gae(paid, values, mask, self.args.gae_gamma, self.args.gae_lambda)
        by_token = {"critic/value": values, "critic/squared_error": (returns - values).square()}
        if ref_logps is not None:
            by_token["kl"] = logps - ref_logps  # k1, as in the reward
        logged = {name: self._from_all_ranks(of[mask.bool()]).mean().item() for name, of in by_token.items()}
        whitened = whiten(advantages, mask, self._from_all_ranks(advantages[mask.bool()]))
        return {"advantages": whitened, "values": values, "returns": returns}, logged

    def _from_all_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values (n,) of this rank and those of all others, one after another, (M,)."""
        padded = self.accelerator.pad_across_processes(values, pad_index=torch.nan)
        gathered: torch.Tensor = self.accelerator.gather(padded)
        return gathered[~gathered.isnan()]

    def learn(self, micro_batches: Sequence[dict[str, Any]], num_tokens: torch.Tensor) -> float:
        """Make one update from the micro-batches of an optimizer step and return its loss over all ranks.

        `num_tokens` is the number of policy tokens in them, averaged over the ranks.
        """
        self.model.train()
        rate = self.args.critic_learning_rate * min(1.0, (self.updates + 1) / max(1, self.args.critic_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for place, batch in enumerate(micro_batches):
            scored = policy_mask(batch)
            values = self.values(*whole(batch), scored)
            loss = value_loss(values, batch["values"], batch["returns"], scored, self.args.value_clip)
            loss = loss / num_tokens.clamp(min=1)
            self._backward(loss, last=place == len(micro_batches) - 1)
            total += loss.item()
        self.updates += 1
        self.model.eval()
        mean = self.accelerator.reduce(torch.tensor(total, device=self.accelerator.device), reduction="mean")
        return mean.item()

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        if self.deepspeed:
            self.model.set_gradient_accumulation_boundary(is_boundary=last)
            self.model.backward(loss, scale_wrt_gas=False)
            if last:
                self.model.step()
            return
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            loss.backward()
        if last:
            if self.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and number of updates; every rank calls it."""
        if self.deepspeed:
            self.model.save_checkpoint(str(folder), client_state={"updates": self.updates})
        elif self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            state = {
                "model": self.accelerator.unwrap_model(self.model).state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "updates": self.updates,
            }
            torch.save(state, folder / "critic.pt")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises `UserError` if there is no critic in the checkpoint."""
        if not folder.is_dir():
            raise UserError(f"{folder.parent} holds no critic: it is no checkpoint of algorithm ppo; resume another")
        if self.deepspeed:
            _, state = self.model.load_checkpoint(str(folder))
        else:
            state = torch.load(folder / "critic.pt", map_location="cpu", weights_only=True)
            self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


def value_model(base: str, model_options: dict[str, Any]) -> Any:
    """Load the policy's base weights under a head of one number that starts at 0, without dropout.

    So the first values are 0, and the first advantages are the whitened returns. Raises `UserError` if transformers
    has no such head for this kind of model.
    """
    from transformers import AutoConfig, AutoModelForTokenClassification
    from transformers.integrations import is_deepspeed_zero3_enabled
    from trl.trainer.utils import disable_dropout_in_model

    known = {name: value for name, value in model_options.items() if name in ("revision", "trust_remote_code")}
    if type(AutoConfig.from_pretrained(base, **known)) not in AutoModelForTokenClassification._model_mapping:
        raise UserError(f"transformers has no value head for {base}; algorithm reinforce, rloo or grpo needs none")
    # In 32 bits, whatever the policy is in: an update of 1e-5 would round to nothing in bfloat16.
    options = {name: value for name, value in model_options.items() if name != "device_map"} | {"dtype": "float32"}
    with without_load_report():
        model = AutoModelForTokenClassification.from_pretrained(base, num_labels=1, **options)
    disable_dropout_in_model(model)
    backbone = f"{model.base_model_prefix}."
    head = [parameter for name, parameter in model.named_parameters() if not name.startswith(backbone)]
    gathered: Any = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(head, modifier_rank=0)
    with gathered, torch.no_grad():
        for parameter in head:
            parameter.zero_()
    return model


@contextmanager
def without_load_report() -> Iterator[None]:
    """Keep transformers from telling at length that the head is new: it is meant to be."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float
) -> torch.Tensor:
    """Return the sum over tokens under `mask` of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2, (N, T)."""
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (worse * mask).sum()


def _decays(name: str) -> bool:
    return not name.endswith("bias") and "norm" not in name.lower()
