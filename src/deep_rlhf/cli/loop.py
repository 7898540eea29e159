"""`deep-rlhf loop`: the trainer alone; people label on a page that another command serves from the same store."""

import logging
import os
import signal
import threading
from functools import partial

import torch

from deep_rlhf.cli.flags import output_folder, parse_flags
from deep_rlhf.cli.loop_config import GUARDED, LoopConfig, mean_taste, open_labeler, open_prompts, run_folder_errors
from deep_rlhf.cli.status_line import StatusLine
from deep_rlhf.cli.synthetic_policy import cached_policy, cached_policy_folder
from deep_rlhf.feedback.loop.checkpoints import exclusive_run
from deep_rlhf.feedback.loop.session import Session
from deep_rlhf.feedback.loop.stop_signal import StopRequested
from deep_rlhf.feedback.state import STOP, report_status, stop_requested
from deep_rlhf.feedback.store import Store
from deep_rlhf.runtime.signals import Stopped

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Runs the loop until its updates are done, the stop button or a signal; the same command continues it."""
    (config,) = parse_flags(argv, LoopConfig, prog="deep-rlhf loop", description=__doc__.split("\n")[0])
    is_guarded = bool(os.environ.get(GUARDED))
    if is_guarded:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background processes ignore it
        threading.Thread(target=_interrupt_at_end_of_input, daemon=True).start()
    if not torch.cuda.is_available():
        torch.set_num_threads(config.threads_each)
    folder = output_folder(config.output_dir)
    with run_folder_errors(), Store(config.store_address) as store, exclusive_run(folder, store), StatusLine(store):
        if not is_guarded:  # `teach` has cleared it, and the button may have been pressed since
            STOP.write(store, None)
        labeler = open_labeler(config)
        try:
            model = config.model or _synthetic_policy(store)
        except StopRequested:
            report_status(store, "stopped", step=0, text="The loop was stopped during pretraining.")
            logger.info("The loop was stopped during pretraining; the same command starts again.")
            return
        prompts, held_out_prompts = open_prompts(config, labeler)
        session = Session(
            config,
            store=store,
            output_dir=folder,
            model=model,
            prompts=prompts,
            held_out_prompts=held_out_prompts,
            labeler=labeler,
            judge=partial(mean_taste, config) if config.labeler == "simulated" else None,
        )
        ending = session.run()
    if ending == "interrupted":
        logger.info("The same command continues. The current policy: %s", folder / "model")
        raise Stopped(session.stop_signal.signal_number or signal.SIGINT)
    what = "All updates are done." if ending == "done" else "The loop was stopped; the same command continues."
    logger.info("%s The policy: %s   The reward model: %s", what, folder / "model", folder / "reward_model")


def _synthetic_policy(store: Store) -> str:
    """The folder of the synthetic task's policy, which is pretrained in a minute or two the first time.

    Raises StopRequested if the stop button is pressed meanwhile.
    """

    def check() -> None:
        if stop_requested(store):
            raise StopRequested("stopped")

    if not cached_policy_folder().is_dir():
        text = "Pretraining the small policy: a minute or two, the first time only."
        report_status(store, "pretraining", step=0, text=text)
    return str(cached_policy(on_step=check))


def _interrupt_at_end_of_input() -> None:
    while os.read(0, 4096):  # sys.stdin has a lock that a thread must not hold when the interpreter exits
        pass
    os.kill(os.getpid(), signal.SIGINT)
