"""The training loop of SFT, reward models and DPO.

A subclass says how examples become a batch and what the loss of a batch is. Where it departs from
transformers.Trainer: every process reads the whole data set from memory; the loss of an update is a sum that is divided
by the number of items of all its batches in all processes, and gradients are summed over processes, so neither
accumulation nor the number of processes changes a result; checkpoints resume to the last bit.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DefaultFlowCallback, PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import speed_metrics

from deep_rlhf.algorithms.supervised.batches import (
    Batch,
    batches_of_process,
    epoch_order,
    in_order_of_rows,
    read_batches,
)
from deep_rlhf.algorithms.supervised.checkpoints import RunCheckpoints
from deep_rlhf.algorithms.supervised.config import SupervisedConfig
from deep_rlhf.algorithms.supervised.optimiser import make_optimizer, make_scheduler
from deep_rlhf.algorithms.supervised.progress import TrainingBar
from deep_rlhf.errors import ConfigError, DataError, NotFiniteError
from deep_rlhf.runtime.finite import check_finite
from deep_rlhf.runtime.processes import Runtime


class SupervisedTrainer:
    """Trains `model` on `train_dataset` and evaluates it on `eval_dataset`: sequences of examples in memory.

    Subclasses implement `collate` and `loss`, and for evaluation `outputs` and `metrics`. Callbacks are those of
    transformers; they are called at the same moments as by transformers.Trainer.
    """

    def __init__(
        self,
        model: Any,
        config: SupervisedConfig,
        *,
        train_dataset: Sequence[Any] = (),
        eval_dataset: Sequence[Any] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Moves `model` to the device of `config`.

        Raises ConfigError if evaluations are wanted without a data set, and NotFiniteError if a weight is NaN or
        infinite.
        """
        config.set_seeds()
        self.config = config
        self.runtime = Runtime()
        self.model: Any = model.to(config.device)
        check_finite(self.model, "The model cannot be trained")
        if hasattr(self.model, "config"):
            self.model.config.use_cache = config.use_cache  # keys and values of texts that are never continued
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        if train_dataset and not eval_dataset and config.eval_strategy != "no":
            raise ConfigError(
                f"--eval_strategy={config.eval_strategy.value} needs held-out data: give some, or set it to no."
            )
        self.run_flags: dict[str, Any] = {**config.to_dict(), "number of processes": self.runtime.processes}
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.state = TrainerState(
            is_local_process_zero=config.local_process_index == 0, is_world_process_zero=self.runtime.is_main
        )
        self.control = TrainerControl()
        bar = PrinterCallback if config.disable_tqdm else TrainingBar
        given = [DefaultFlowCallback, *get_reporting_integration_callbacks(config.report_to), *callbacks, bar]
        self.callbacks = CallbackHandler(given, self.model, None, None, None)
        self._call("on_init_end")
        # of the updates since the last log entry, in this process; and of all before, in all processes
        self.loss_since_log = torch.zeros((), device=config.device)
        self.loss_until_log = 0.0
        self.last_logged_step = 0
        self.flops = 0.0  # since the beginning, in this process
        self._update_figures: dict[str, float] = {}

    # ---- what a kind of training defines

    def network(self) -> Any:
        """The transformers model that `model` is, or wraps."""
        return self.model

    def collate(self, examples: list[Any]) -> Batch:
        """A batch of tensors, without padding beyond its longest example."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of the batch's items, a scalar with gradients."""
        raise NotImplementedError

    def items(self, batch: Batch) -> Tensor:
        """How many items the loss of the batch is a sum over, a scalar."""
        return torch.tensor(len(batch["labels"]), device=self.config.device)

    def outputs(self, batch: Batch) -> Tensor:
        """What the model says of each example, [B, …]."""
        raise NotImplementedError

    def metrics(self, outputs: Tensor, examples: Sequence[Any]) -> dict[str, float]:
        """Figures of an evaluation from the outputs [N, …] of N examples."""
        raise NotImplementedError

    def gradients(self, batches: Sequence[Batch], count: Tensor) -> list[Tensor]:
        """Adds the gradients of Σ loss / count and returns each batch's share of the loss.

        count: items of all batches of the update, in all processes.
        """
        losses = []
        for batch in batches:
            with self.autocast():
                loss = self.loss(batch) / count
            loss.backward()
            losses.append(loss.detach())
        return losses

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the run."""
        return make_optimizer(self.model, self.config)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights by name, as checkpoints hold them."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Puts back what `weights` returned."""
        for name, weight in self.weights().items():
            weight.copy_(weights[name])

    def autocast(self) -> Any:
        """The context of a forward pass: bfloat16 where `--bf16` asks for it."""
        return torch.autocast(self.config.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()

    # ---- training

    def train(self) -> dict[str, float]:
        """Trains from the beginning, or from the checkpoint that the configuration names; returns the last log entry.

        The best evaluated weights are kept with `load_best_model_at_end`. Ctrl-C, SIGTERM and SIGHUP save a checkpoint
        after the current update and raise Stopped. Raises DataError without enough data for a batch, CheckpointError if
        a checkpoint cannot be written or belongs to a run with other flags, and NotFiniteError at the first loss,
        gradient or output that is NaN or infinite, before it reaches a weight.
        """
        config = self.config
        per_epoch = len(self._batches(0))
        if not per_epoch:
            raise DataError(f"{len(self.train_dataset)} training examples are too few for one batch: give more data.")
        updates_per_epoch = -(-per_epoch // config.gradient_accumulation_steps)
        max_steps = (
            config.max_steps if config.max_steps >= 0 else math.ceil(config.num_train_epochs * updates_per_epoch)
        )
        if config.gradient_checkpointing or getattr(config, "activation_checkpointing", False):
            _enable_activation_checkpointing(self.network())
        self.optimizer = self.make_optimizer()
        self.scheduler = make_scheduler(self.optimizer, config, max_steps)
        self.callbacks.optimizer, self.callbacks.lr_scheduler = self.optimizer, self.scheduler
        checkpoints = RunCheckpoints(self)
        random = checkpoints.resume(max_steps)
        state = self.state
        state.train_batch_size = config.per_device_train_batch_size
        state.max_steps, state.num_train_epochs = max_steps, -(-max_steps // updates_per_epoch)
        state.compute_steps(config, max_steps)
        self.model.zero_grad()
        started, first_step = time.time(), state.global_step
        self._call("on_train_begin")
        if config.eval_on_start and not first_step:
            self.evaluate()
        with checkpoints.saved_on_signal():
            first_epoch = first_step // updates_per_epoch
            last_epoch = (
                state.num_train_epochs if first_step < max_steps else first_epoch
            )  # a finished run has none left
            for epoch in range(first_epoch, last_epoch):
                done = max(0, first_step - epoch * updates_per_epoch) * config.gradient_accumulation_steps
                self._epoch(epoch, done, random, checkpoints)
                random = None
                if self.control.should_training_stop:
                    break
            metrics = self._training_metrics(started, first_step)
            if config.load_best_model_at_end:
                checkpoints.load_best()
            self._call("on_train_end")
        return metrics

    def log(self, metrics: dict[str, float]) -> None:
        """Adds an entry to the history and sends it to the trackers."""
        if self.state.epoch is not None:
            metrics["epoch"] = self.state.epoch
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self._call("on_log", metrics)

    @property
    def history(self) -> list[dict[str, float]]:
        """What was logged so far."""
        return self.state.log_history

    def add_callback(self, callback: TrainerCallback) -> None:
        """Calls `callback`, too, at every moment that transformers.TrainerCallback names."""
        self.callbacks.add_callback(callback)

    def remove_callback(self, kind: type[TrainerCallback]) -> None:
        """Removes the first callback of this class, if there is one."""
        self.callbacks.remove_callback(kind)

    # ---- evaluation

    def evaluate(self) -> dict[str, float]:
        """Evaluates on `eval_dataset` and logs the figures, each with the prefix `eval_`."""
        started, count = time.time(), len(self.eval_dataset)
        figures = self.metrics(self._outputs(self.eval_dataset), self.eval_dataset)
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        steps = math.ceil(count / (self.config.per_device_eval_batch_size * self.runtime.processes))
        metrics |= speed_metrics("eval", started, num_samples=count, num_steps=steps)
        self.log(metrics)
        self._call("on_evaluate", metrics)
        return metrics

    def predict(self, examples: Sequence[Any]) -> Tensor:
        """The outputs [N, …] of the model as it is now, on the CPU, in the order of the examples."""
        outputs = self._outputs(examples)
        self._call("on_predict", {})
        return outputs

    @torch.no_grad()
    def _outputs(self, examples: Sequence[Any]) -> Tensor:
        self.model.eval()
        rank, processes = self.runtime.rank, self.runtime.processes
        rows, size = range(len(examples)), self.config.per_device_eval_batch_size
        batches = batches_of_process(rows, size, rank=rank, processes=processes)
        self.callbacks.eval_dataloader = batches  # a bar wants to know how many
        parts = []
        for batch in read_batches(examples, batches, self.collate, self.config.device):
            with self.autocast():
                parts.append(self.outputs(batch).float().cpu())
            self._call("on_prediction_step")
        outputs = in_order_of_rows(self.runtime.gather(parts), len(examples))
        if not outputs.isfinite().all():
            raise NotFiniteError(
                f"After update {self.state.global_step} the model's output is {_not_finite(outputs)} for an example:"
                f" lower --learning_rate ({self.config.learning_rate:g}), or start from another model."
            )
        return outputs

    # ---- the parts of an epoch

    def _batches(self, epoch: int) -> list[list[int]]:
        config = self.config
        seed = config.seed if config.data_seed is None else config.data_seed
        shuffle = config.train_sampling_strategy == "random"
        return batches_of_process(
            epoch_order(len(self.train_dataset), seed=seed, epoch=epoch, shuffle=shuffle),
            config.per_device_train_batch_size,
            rank=self.runtime.rank,
            processes=self.runtime.processes,
            drop_last=config.dataloader_drop_last,
        )

    def _epoch(self, epoch: int, done: int, random: Any, checkpoints: RunCheckpoints) -> None:
        """One pass over the data, of which the first `done` batches were read before the run was stopped."""
        self._call("on_epoch_begin")
        rows = self._batches(epoch)
        if random is not None and not done:
            checkpoints.set_random(random)
        batches = read_batches(self.train_dataset, rows[done:], self.collate, self.config.device)
        if random is not None and done:  # the stopped run had begun to read this epoch
            checkpoints.set_random(random)
        while group := list(islice(batches, self.config.gradient_accumulation_steps)):
            self._update(group)
            done += len(group)
            self.state.global_step += 1
            self.state.epoch = epoch + done / len(rows)
            self._call("on_step_end")
            self._log_and_evaluate()
            if self.control.should_epoch_stop or self.control.should_training_stop or done == len(rows):
                break  # what ends an epoch is logged before it is saved
            checkpoints.save_if_due()
        self._call("on_epoch_end")
        self._log_and_evaluate()
        checkpoints.save_if_due()

    def _update(self, batches: Sequence[Batch]) -> None:
        """One step of the optimiser."""
        config = self.config
        count = self.runtime.sum(torch.stack([self.items(batch) for batch in batches]).sum()).float()
        self._call("on_step_begin")
        self.model.train()
        losses = self.gradients(batches, count)
        for loss in losses:
            self.loss_since_log += loss
        self.flops += sum(map(self._flops_of, batches))
        self.runtime.sum_gradients(weight for weight in self.model.parameters() if weight.grad is not None)
        limit = config.max_grad_norm if config.max_grad_norm > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        total = self.runtime.sum(torch.stack(losses).sum().float())
        grad_norm = self._finite_norm(*torch.stack([total, norm.to(total)]).tolist())
        self._call("on_pre_optimizer_step")
        self.optimizer.step()
        self._call("on_optimizer_step")
        self._update_figures = {"grad_norm": grad_norm, "learning_rate": float(self.scheduler.get_last_lr()[0])}
        self.scheduler.step()
        self.model.zero_grad()

    def _finite_norm(self, loss: float, norm: float) -> float:
        """The gradient's norm. Raises NotFiniteError before the optimiser's step if it or the loss is not finite."""
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                self.model.zero_grad()
                raise NotFiniteError(
                    f"Training stopped in update {self.state.global_step + 1}, whose {name} is {value}: lower"
                    f" --learning_rate ({self.config.learning_rate:g}), or look for extreme values in data and flags."
                )
        return norm

    def _log_and_evaluate(self) -> None:
        """What is due at this step; sets `control.should_save` under save_strategy="best"."""
        state = self.state
        if self.control.should_log and state.global_step > self.last_logged_step:
            loss = self.runtime.sum(self.loss_since_log.clone()).item()
            self.loss_since_log.zero_()
            metrics = {"loss": loss / (state.global_step - self.last_logged_step), **self._update_figures}
            self.loss_until_log += loss
            self.last_logged_step = state.global_step
            self.log(metrics)
        if self.control.should_evaluate:
            is_best = self._note_best(self.evaluate())
            if self.config.save_strategy == "best":
                self.control.should_save = is_best

    def _note_best(self, metrics: dict[str, float]) -> bool:
        """Whether the metric for the best model is better than ever."""
        name = self.config.metric_for_best_model
        if name is None:
            return False
        name = name if name.startswith("eval_") else f"eval_{name}"
        sign = 1 if self.config.greater_is_better else -1
        best = self.state.best_metric
        if not sign * metrics[name] > (-math.inf if best is None else sign * best):
            return False
        self.state.best_metric, self.state.best_global_step = metrics[name], self.state.global_step
        return True

    def _training_metrics(self, started: float, first_step: int) -> dict[str, float]:
        """Speed, floating-point operations and mean loss of the run, which are logged."""
        state, config = self.state, self.config
        steps = state.global_step - first_step
        loss = self.loss_until_log + self.runtime.sum(self.loss_since_log.clone()).item()
        together = config.per_device_train_batch_size * config.gradient_accumulation_steps * self.runtime.processes
        examples = (
            state.max_steps * together if config.max_steps > 0 else len(self.train_dataset) * config.num_train_epochs
        )
        metrics = speed_metrics(
            "train", started, num_samples=examples * steps / max(state.max_steps, 1), num_steps=steps
        )
        metrics["total_flos"] = state.total_flos = sum(self.runtime.gather(self.flops))
        metrics["train_loss"] = loss / max(state.global_step, 1)
        self.log(metrics)
        return metrics

    def _flops_of(self, batch: Batch) -> float:
        """Floating-point operations of a forward and backward pass; 0 where the model does not count its weights."""
        if "input_ids" not in batch or not hasattr(self.model, "num_parameters"):
            return 0.0
        return float(6 * batch["input_ids"].numel() * self.model.num_parameters(exclude_embeddings=True))

    def _call(self, moment: str, *given: Any) -> None:
        """Tells every callback; what they ask for is in `control`."""
        self.control = getattr(self.callbacks, moment)(self.config, self.state, self.control, *given)


def _not_finite(values: Tensor) -> float:
    return float(values[~values.isfinite()][0])


def _enable_activation_checkpointing(model: Any) -> None:
    """Recomputes activations in the backward pass instead of keeping them."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # before transformers renamed it
        model.gradient_checkpointing_enable()
