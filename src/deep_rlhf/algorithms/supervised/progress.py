"""The progress bar of supervised training."""

from typing import Any

from transformers import ProgressCallback


class TrainingBar(ProgressCallback):
    """transformers' progress bar with the newest losses beside it, instead of a printed line for each log entry."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_prediction_step(args, state, control, **kwargs)
        if self.prediction_bar is not None and not self.prediction_bar.desc:
            self.prediction_bar.leave = False
            self.prediction_bar.set_description("evaluation")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None:
            shown = {name: f"{logs[name]:.4g}" for name in ("loss", "eval_loss", "eval_accuracy") if name in logs}
            self.training_bar.set_postfix(shown) if shown else None
