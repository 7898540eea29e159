"""`deep-rlhf loop`: only the trainer; people answer on a page that another command serves, on the same store."""

import logging
import os
import signal
import threading
from functools import partial

import torch

from deep_rlhf.cli.flags import output_folder, parse_flags
from deep_rlhf.cli.loop_config import GUARDED, LoopConfig, mean_taste, open_labeler, open_prompts
from deep_rlhf.cli.loop_progress import Progress
from deep_rlhf.cli.world_policy import cached_world_policy, world_policy_folder
from deep_rlhf.feedback.loop.checkpoints import only_here
from deep_rlhf.feedback.loop.session import Session
from deep_rlhf.feedback.loop.stop_signal import Halted
from deep_rlhf.feedback.state import STOP, report_status, stop_requested
from deep_rlhf.feedback.store import Store

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """Runs the loop until its updates are done, the red button or Ctrl-C; the same command goes on."""
    (config,) = parse_flags(argv, LoopConfig, prog="deep-rlhf loop", description=__doc__.split("\n")[0])
    if os.environ.get(GUARDED):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background programs ignore
        threading.Thread(target=_end_with_input, daemon=True).start()
    if not torch.cuda.is_available():
        torch.set_num_threads(config.threads_each)
    folder = output_folder(config.output_dir)
    address = config.store_address
    with Store(address) as store, only_here(folder, store), Progress(store):
        if not os.environ.get(GUARDED):  # `teach` has released the button, and somebody may have pressed it since
            STOP.write(store, None)
        labeler = open_labeler(config)
        try:
            model = config.model or _world_policy(store)
        except Halted:
            report_status(store, "stopped", step=0, text="The loop was stopped while its policy was being made.")
            logger.info("The loop was stopped while its policy was being made; the same command begins again.")
            return
        session = Session(
            config,
            store=store,
            store_url=address,
            output_dir=folder,
            model=model,
            prompts=(prompts := open_prompts(config, labeler))[0],
            held_out_prompts=prompts[1],
            labeler=labeler,
            pace=config.pace,
            judge=partial(mean_taste, config) if config.labeler == "simulated" else None,
            threads=config.threads_each,
        )
        ending = session.run()
    if ending == "interrupted":
        logger.info("The same command goes on from here. The policy as it is now: %s", folder / "model")
        raise KeyboardInterrupt
    what = "All updates are done." if ending == "done" else "The loop was stopped; the same command goes on."
    logger.info("%s The policy: %s   The reward model: %s", what, folder / "model", folder / "reward_model")


def _world_policy(store: Store) -> str:
    """The embedded world's policy, which takes a minute or two when it is made for the first time.

    Raises Halted if the red button is pressed meanwhile.
    """

    def check() -> None:
        if stop_requested(store):
            raise Halted("stopped")

    if not world_policy_folder().is_dir():
        text = "The small policy learns its English: a minute or two, the first time only."
        report_status(store, "pretraining", step=0, text=text)
    return str(cached_world_policy(on_step=check))


def _end_with_input() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGINT)
