"""The training loop with people in it (Christiano et al. 2017, §2.2): ask, refit the reward model, update the policy.

In async mode three things happen at once and meet only in the store: people label whenever they like, another process
refits the reward model whenever there are enough new labels, and this process samples, scores and updates the policy.
It waits for the first reward model only. In batched mode the three take turns in one process, and the same seed gives
the same run.

Departures from the paper: a reward is given to a whole response, it is normalised once, on responses of the start
policy, and a KL penalty keeps the policy near the start policy.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.accel.cpu.allocator import kept_memory
from deep_rlhf.algorithms.ppo import PPO
from deep_rlhf.errors import NotFiniteError
from deep_rlhf.feedback.annotators.base import BackgroundLabeler, Labeler, People
from deep_rlhf.feedback.loop.build import (
    current_models,
    ensure_start_responses,
    make_trainer,
    open_rewards,
    policy_version,
    refit_job,
    save_models,
    start_policy,
    version_of,
    weight_count,
)
from deep_rlhf.feedback.loop.checkpoints import SessionCheckpoints, SessionProgress, digest_of, policy_fingerprint
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.loop.label_collection import LabelCollector
from deep_rlhf.feedback.loop.policy_versions import PolicyVersions
from deep_rlhf.feedback.loop.stop_signal import StopRequested, StopSignal
from deep_rlhf.feedback.loop.store_link import StoreLink
from deep_rlhf.feedback.monitoring.monitor import Judge, Monitor
from deep_rlhf.feedback.questions.candidates import LogOdds
from deep_rlhf.feedback.questions.questions import CurrentModels, Questions
from deep_rlhf.feedback.questions.schedule import Schedule
from deep_rlhf.feedback.records import Alarm, Row
from deep_rlhf.feedback.reward_refit.preferences import training_preferences
from deep_rlhf.feedback.reward_refit.supervisor import RefitProcess
from deep_rlhf.feedback.reward_refit.versions import (
    Refits,
    Refitted,
    check_continuation,
    newest_version,
    set_damaged_aside,
    version_until,
)
from deep_rlhf.feedback.state import LoopState
from deep_rlhf.feedback.store import Store
from deep_rlhf.models.reward import RewardModel

logger = logging.getLogger(__name__)

JUDGED_PROMPTS = 24  # prompts whose responses compare versions of the policy
POLL_SECONDS = 0.2  # while waiting for the first reward model
MOST_DOUBLINGS = 10  # of the KL coefficient, by roll-backs

Ending = Literal["done", "stopped", "interrupted"]


class Session:
    """One run of the loop in a folder; `run` continues from the newest checkpoint there."""

    def __init__(
        self,
        config: SessionConfig,
        *,
        store: Store,
        output_dir: str | Path,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompts: Sequence[str],
        held_out_prompts: Sequence[str],
        labeler: Labeler | None = None,
        judge: Judge | None = None,
        schedule: Schedule | None = None,
        on_update: Callable[[Row], None] | None = None,
    ) -> None:
        """Opens the models, or the newest checkpoint in `output_dir`.

        model: the start policy; a folder or Hub name in async mode, where another process opens it too. tokenizer: by
        default that of `model`. held_out_prompts: for measurements only (blind pairs, fixed prompts, versions).
        labeler: who labels; by default people on the page. judge: the ground truth of a simulation, for the metric
        "gold". schedule: replaces the label schedule of `config`. on_update: called with the metrics of every update.

        Raises CheckpointError if the folder or the store belong to another run, and what PPOTrainer raises.
        """
        self.config, self.store, self.output_dir = config, store, Path(output_dir).absolute()
        self.trainer = make_trainer(config, model, tokenizer, prompts)
        self.rewards = self.output_dir / "rewards"
        self.refit_job = refit_job(config, model, weight_count(self.trainer.policy))
        self.progress = SessionProgress()
        self._checkpoints = SessionCheckpoints(self.output_dir, store, policy_fingerprint(self.trainer))
        self._texts = {"prompts": digest_of(self.trainer.prompts), "held_out_prompts": digest_of(held_out_prompts)}
        if (found := self._checkpoints.newest()) is not None:
            self.progress = SessionProgress(**found["progress"])
            self._checkpoints.check_settings(self._kept_settings())
        set_damaged_aside(self.rewards)
        check_continuation(self.rewards, self.refit_job)
        self.stop_signal = StopSignal(store, self.trainer.sampler.policy.trunk)
        self.monitor = Monitor(config.limits, judge)
        shown = list(held_out_prompts or prompts)[: config.fixed_prompts]
        not_shown = list(held_out_prompts)[config.fixed_prompts :] or list(held_out_prompts)
        self.link = StoreLink(store)
        questions = Questions(config, store, self.trainer.prompts, not_shown, labels=self.link.log)
        self.collector = LabelCollector(
            config, store, questions, labeler or People(), schedule=schedule, stop_signal=self.stop_signal
        )
        self.versions = PolicyVersions(
            self.trainer,
            self.output_dir / "versions",
            shown=shown,
            judged=(not_shown or list(prompts))[:JUDGED_PROMPTS],
            is_restorable=self.monitor.tracker.is_restorable,
        )
        self.rewards.mkdir(parents=True, exist_ok=True)
        self._on_update = on_update or (lambda row: None)
        self._scorer: RewardModel | None = None
        self._held_out_scorer: RewardModel | None = None
        self.refit_process: RefitProcess | None = None  # in async mode
        self._pending_alarms: list[Alarm] = []
        self._saved_step: int | None = None  # if nothing has changed since the checkpoint of this step

    # ---- the loop

    def run(self) -> Ending:
        """Runs until `config.updates` are done, an alarm, the stop button or Ctrl-C; then saves everything.

        The caller clears an earlier stop request (state.STOP) beforehand.
        """
        with self.stop_signal, kept_memory():
            try:
                self.begin()
                if self.config.mode == "async":
                    self._run_async()
                else:
                    self._run_batched()
                ending: Ending = "done"
            except StopRequested as request:
                ending = request.ending
            except Exception as error:
                self._report("stopped", f"The loop ended with an error: {error}")
                raise
        self._end(ending)
        return ending

    def _run_async(self) -> None:
        config, labeler = self.config, self.collector.labeler
        process = RefitProcess(self.refit_job, self.rewards, self.store.url, threads=config.threads_each)
        self.refit_process, annotators = process, None
        if not isinstance(labeler, People):
            annotators = BackgroundLabeler(labeler, self.store, pace=config.pace, wanted=self._wanted)
        try:
            while self.progress.step < config.updates:
                self.stop_signal.check()
                self._handle_alarms()
                if (found := process.poll(self.progress.reward_version)) is not None:
                    self._adopt(found)
                if annotators is not None and annotators.error is not None:
                    raise annotators.error
                self.link.attempt(lambda: self.collector.top_up(self.progress.step, self._current_models()))
                if self._scorer is None:
                    self._wait_for_reward()
                else:
                    self._update()
        finally:
            process.stop()
            if annotators is not None:
                annotators.stop()

    def _run_batched(self) -> None:
        """Labels and a refit before every few updates. A checkpoint comes before, so a kill leaves half of one at most.

        Whatever of it is in the store or on the disk already is used, and not made again.
        """
        refits = Refits(self.refit_job, self.rewards, self.store, policy=lambda: start_policy(self.trainer))
        while (step := self.progress.step) < self.config.updates:
            is_due = step % self.config.batched_updates == 0 and self.progress.reward_step != step
            if is_due or self._scorer is None:
                if self._saved_step != step:
                    self._checkpoint()
                self.collect_labels(self._wanted() or 0)
                self.link.log.refresh()
                self._refit(refits)
            self.stop_signal.check()
            self._update()

    def _refit(self, refits: Refits) -> None:
        """Adopts the next reward model; one that is not finite is only warned about, and the former stays."""
        try:
            refitted = refits.version_after(self.progress.reward_version)
        except NotFiniteError as error:
            if self._scorer is None:
                raise
            logger.warning("A refit failed: version %d of the reward stays. %s", self.progress.reward_version, error)
            return
        self._adopt(refitted)

    def collect_labels(self, count: int) -> None:
        """Waits for `count` more labels. Raises StopRequested."""
        self.collector.collect(count, self._current_models(), self._report)

    def begin(self) -> None:
        """Restores the newest checkpoint, or makes version 0 of the policy."""
        self._report("starting", "Opening the policy.")
        self.link.log.refresh()
        if (found := self._checkpoints.newest()) is not None:
            self._restore(found)
        else:
            self.link.begin()
            self.progress.policy_version = self._checkpoints.next_version() - 1
            self.versions.remove_after(self.progress.policy_version)
            self._new_version(None)
            self._checkpoint()
        self.link.send_all()
        if self.config.mode == "async":  # before what follows, so that people need not wait for it
            self.collector.top_up(self.progress.step, self._current_models())
        ensure_start_responses(self.rewards, self.trainer)
        newest = newest_version(self.rewards)
        if self.config.mode == "batched":  # a version that was fitted after the checkpoint is adopted in its turn
            newest = version_until(self.rewards, self.progress.reward_version)
        if newest is not None:
            self._adopt(newest, resumed=True)
        if self.progress.restored is not None:
            self._new_version(self._scorer)

    def _restore(self, found: dict[str, Any]) -> None:
        """Continues from a checkpoint, with what may have changed in the settings since."""
        self.trainer.restore(found["trainer"])
        self.trainer.bad_batches, self.trainer.bad_in_a_row = found.get("bad_batches", (0, 0))
        self._apply_settings()
        self.monitor.state = found["monitor"]
        self.link.restore(found.get("outbox"), policy=self.progress.policy_version)
        self.versions.remove_after(self.progress.policy_version)
        logger.info("Continuing after update %d.", self.progress.step)

    def _end(self, ending: Ending) -> None:
        self.link.send_all()
        self._checkpoint()
        self._report("stopped", "All updates are done." if ending == "done" else f"The loop was {ending}.")
        save_models(self.output_dir, self.rewards, self.trainer)

    # ---- one update

    def _update(self) -> None:
        """One update of the policy, its metrics and alarms; a version or a checkpoint where one is due."""
        self._report("training", f"Update {self.progress.step + 1}: sampling, scoring and training.")
        metrics = self.trainer.step(self.progress.step)
        self.progress.step += 1
        rollout = self.trainer.last_rollout
        assert rollout is not None
        assert self._scorer is not None
        row, raised = self.monitor.update(metrics, rollout, self._held_out_scorer)
        self._pending_alarms += raised
        self.link.refresh_labels()
        row |= {
            "step": self.progress.step,
            "policy_version": self.progress.policy_version,
            "reward_version": self.progress.reward_version,
            "labels": self.link.log.count,
        }
        self.link.outbox.rows.append(row)
        self.link.send()
        self._on_update(row)
        self._handle_alarms()
        if self.progress.step - self.progress.version_step >= self.config.version_every:
            self._new_version(self._scorer)
        if self.progress.step % self.config.save_every == 0:
            self._checkpoint()

    def _adopt(self, refitted: Refitted, *, resumed: bool = False) -> None:
        """Trains the policy against this reward model from now on, unless its sign is wrong: that stops the loop.

        `resumed`: an earlier run has used it or was stopped by its sign; with a wrong sign the next one is awaited.
        """
        self._saved_step = None
        scorer, held_out_scorer = open_rewards(refitted, self.trainer)
        self.link.refresh_labels()
        fitted, _ = training_preferences([one for one in self.link.labels if one.event_id <= refitted.last_event])
        raised = self.monitor.check_sign(scorer, fitted, self.progress.step)
        is_new = refitted.number > self.progress.reward_version
        if is_new:
            self.link.outbox.versions.append((version_of(refitted, self.progress.step), []))
        if any(alarm.action == "stop" for alarm in raised):
            self.progress.reward_version = refitted.number
            if resumed:
                logger.warning("The newest reward model still has the wrong sign; waiting for the next one.")
                return
            self._pending_alarms += raised
            self._handle_alarms()
        if is_new:
            self.monitor.replace_rewards(scorer, held_out_scorer)
        self._scorer = self.trainer.scorer = scorer
        self._held_out_scorer = held_out_scorer
        if is_new and self.progress.step > self.progress.version_step:
            self._new_version(scorer)  # the policy that was trained against the former reward model
        self.progress.reward_version, self.progress.reward_labels = refitted.number, refitted.labels
        self.progress.reward_last_event = refitted.last_event
        if not is_new:
            return
        self.progress.reward_step = self.progress.step
        self.monitor.compare_win_rates(self.link.blind_pairs(), LogOdds(scorer), self.config.label_noise)
        self._pending_alarms += raised
        self._handle_alarms()

    def _new_version(self, scorer: RewardModel | None) -> None:
        """Makes a version of the current policy, which questions are about from now on."""
        self._saved_step = None
        number = self.progress.policy_version + 1
        version = policy_version(number, self.progress, self.link.win_rate())
        samples = self.versions.add(number, self._held_out_scorer or scorer, self.link.labels, self.monitor.figures)
        self.progress.policy_version, self.progress.version_step = number, self.progress.step
        self.progress.restored = None
        self.link.add_policy(version, samples)

    # ---- alarms

    def _handle_alarms(self) -> None:
        """Records new alarms and applies the most severe action. Raises StopRequested if that is to stop.

        A roll-back and its alarms are saved in one checkpoint: neither a kill nor the stop button separates them.
        """
        alarms, self._pending_alarms = self._pending_alarms, []
        actions = {alarm.action for alarm in alarms}
        rolls_back = "stop" not in actions and "roll_back" in actions and self._scorer is not None
        effect = self._roll_back() if rolls_back else ""
        for alarm in alarms:
            if rolls_back and alarm.action == "roll_back":
                alarm = dataclasses.replace(alarm, message=f"{alarm.message} {effect}")
            logger.warning("Alarm after update %d, %s: %s", alarm.step, alarm.action.replace("_", " "), alarm.message)
            self.link.outbox.alarms.append(alarm)
        if rolls_back:
            self._checkpoint()
        self.link.send()
        if rolls_back:
            self._new_version(self._scorer)
        if "stop" in actions:
            raise StopRequested("stopped")

    def _roll_back(self) -> str:
        """Restores the best version and doubles the KL coefficient, because its cause, the reward, has not changed."""
        assert self._scorer is not None
        number = self.versions.roll_back(self._held_out_scorer or self._scorer, self.link.labels)
        self.monitor.rolled_back(self.versions.figures(number))
        self.progress.restored = number
        self.progress.rolled_back += 1
        self._apply_settings()
        return f"The policy is back at version {number}; the KL coefficient is {self.trainer.kl_coef:g} now."

    def _apply_settings(self) -> None:
        """Replaces what a restored trainer has brought along by what the settings say now."""
        assert isinstance(self.trainer.learner, PPO)
        self.trainer.learner.optimisation.set_learning_rate(self.trainer.config.learning_rate)
        self.trainer.kl_coef = self.config.init_kl_coef * 2 ** min(self.progress.rolled_back, MOST_DOUBLINGS)

    # ---- labels, status and checkpoints

    def _wanted(self) -> int | None:
        return self.collector.wanted(self.progress.step)

    def _current_models(self) -> CurrentModels:
        return current_models(self.trainer, self._scorer, self.progress)

    def _wait_for_reward(self) -> None:
        self.link.refresh_labels()
        count, first = self.link.log.count, self.config.initial_labels
        if count < first:
            self._report("waiting for labels", f"{count} of {first} labels for the first reward model.")
        else:
            self._report("refitting", f"Fitting the first reward model to {count} labels.")
        self.stop_signal.wait(POLL_SECONDS)

    def _checkpoint(self) -> None:
        self._checkpoints.save(
            self.progress.step,
            {
                "trainer": self.trainer.snapshot(),
                "bad_batches": (self.trainer.bad_batches, self.trainer.bad_in_a_row),
                "progress": dataclasses.asdict(self.progress),
                "monitor": self.monitor.state,
                "outbox": self.link.outbox.state,
                "settings": self._kept_settings(),
            },
        )
        self._saved_step = self.progress.step

    def _kept_settings(self) -> dict[str, Any]:
        return self._texts | self.config.kept_settings(has_reward_model=self.progress.reward_version > 0)

    def _report(self, state: LoopState, text: str) -> None:
        self.link.report(state, text, step=self.progress.step)
