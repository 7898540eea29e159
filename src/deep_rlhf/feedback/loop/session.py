"""The loop with people in it (Christiano et al. 2017, §2.2): ask, refit the reward model, improve the policy, again.

In async mode three things go on at once, and meet in the store alone: people answer whenever they like, another process
refits the reward model whenever enough new answers have come, and this one samples, scores and learns, whatever the
others do. Only the first reward model is waited for. In batched mode the three take turns in one process, and the same
seed gives the same run. Where it departs from the paper: the reward is of a whole answer, its scale is set once and for
all on the start policy's answers, and the policy is held near the start by a KL penalty.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deep_rlhf.accel.cpu.allocator import kept_memory
from deep_rlhf.errors import StoreUnavailable
from deep_rlhf.feedback.annotators.base import BackgroundLabeler, Labeler, People
from deep_rlhf.feedback.loop.build import (
    Schedule,
    ensure_start_responses,
    known_reward,
    label_schedule,
    make_trainer,
    open_rewards,
    refit_job,
    save_models,
    version_of,
    weights_of,
)
from deep_rlhf.feedback.loop.checkpoints import Progress, Saved, fingerprint
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.loop.policy_versions import PolicyVersions
from deep_rlhf.feedback.loop.stop_signal import Halted, Halter
from deep_rlhf.feedback.monitoring.monitor import Judge, Monitor
from deep_rlhf.feedback.monitoring.win_rate import BACK_AT, blind_pairs, recent_versions, win_rate
from deep_rlhf.feedback.questions.candidates import LogOdds
from deep_rlhf.feedback.questions.questions import CurrentModels, Questions
from deep_rlhf.feedback.records import Alarm, Label, Row, Version
from deep_rlhf.feedback.reward_refit.preferences import training_preferences
from deep_rlhf.feedback.reward_refit.supervisor import RefitProcess
from deep_rlhf.feedback.reward_refit.versions import (
    Refits,
    Refitted,
    check_continuation,
    newest_version,
)
from deep_rlhf.feedback.state import WIN_RATE, LoopState, report_status
from deep_rlhf.feedback.store import Store
from deep_rlhf.models.reward import RewardModel

logger = logging.getLogger(__name__)

JUDGED_PROMPTS = 24  # by whose answers versions are compared
LOOK_EVERY = 0.2  # seconds between two looks into the store, where there is nothing else to do
MOST_DOUBLINGS = 10  # of the KL penalty, by roll-backs
ROUNDS = 20  # of asking again in batched mode, where annotators cannot tell

Ending = Literal["done", "stopped", "interrupted"]


class Session:
    """One run of the loop, in a folder: `run` goes on until it is done or stopped, wherever it stood before."""

    def __init__(
        self,
        config: SessionConfig,
        *,
        store: Store,
        store_url: str,
        output_dir: str | Path,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompts: Sequence[str],
        held_out_prompts: Sequence[str],
        labeler: Labeler | None = None,
        pace: float = 0.0,
        judge: Judge | None = None,
        schedule: Schedule | None = None,
        on_update: Callable[[Row], None] | None = None,
        threads: int = 1,
    ) -> None:
        """`model` is a folder or name for async mode, whose process of refits opens it again.

        `held_out_prompts` are for what measures: blind pairs, fixed prompts, versions. `pace`: seconds an answer that a
        labeler takes. `judge` scores answers for the curve "gold". `schedule` replaces that of `config`, `on_update`
        sees every row of metrics. `threads`: of the process that refits.

        Raises UserError as PPOTrainer, and if folder or store belong to another run.
        """
        self.config, self.store, self.output_dir = config, store, Path(output_dir)
        self.labeler: Labeler = labeler or People()
        self._pace, self._threads, self._store_url = pace, threads, store_url
        self.trainer = make_trainer(config, model, tokenizer, prompts)
        self.job = refit_job(config, model, weights_of(self.trainer.policy))
        check_continuation(self.output_dir / "rewards", self.job)
        self.progress = Progress()
        self._saved = Saved(self.output_dir, store, fingerprint(self.trainer))
        self.halter = Halter(store, self.trainer.sampler.policy.trunk)
        self.monitor = Monitor(config.limits, judge)
        shown = list(held_out_prompts or prompts)[: config.fixed_prompts]
        unshown = list(held_out_prompts)[config.fixed_prompts :] or list(held_out_prompts)
        self.questions = Questions(config, store, self.trainer.prompts, unshown)
        self.versions = PolicyVersions(
            self.trainer,
            store,
            self.output_dir / "versions",
            shown=shown,
            judged=(unshown or list(prompts))[:JUDGED_PROMPTS],
            is_restorable=self.monitor.tracker.is_restorable,
        )
        self.rewards = self.output_dir / "rewards"
        self.rewards.mkdir(parents=True, exist_ok=True)
        self._schedule = schedule or label_schedule(config)
        self._on_update = on_update or (lambda row: None)
        self._scorer: RewardModel | None = None
        self._held_out: RewardModel | None = None
        self._refitted: Refitted | None = None  # the reward model that the policy learns against
        self.process: RefitProcess | None = None  # of async mode
        self._labels: list[Label] = []
        self._raised: list[Alarm] = []  # and not acted on yet
        self._told: str | None = None

    # ---- the loop

    def run(self) -> Ending:
        """Goes on until `config.updates` are done, an alarm or the red button stops it, or Ctrl-C; then saves all.

        The button (state.STOP) is for the caller to release before; whoever presses it after that is heard.
        """
        with self.halter, kept_memory():
            try:
                self.begin()
                if self.config.mode == "async":
                    self._run_async()
                else:
                    self._run_batched()
                ending: Ending = "done"
            except Halted as halted:
                ending = halted.ending
            except Exception as error:
                self._tell("stopped", f"The loop ended with an error: {error}")
                raise
        self._end(ending)
        return ending

    def _run_async(self) -> None:
        process = self.process = RefitProcess(self.job, self.rewards, self._store_url, threads=self._threads)
        annotators = None
        if not isinstance(self.labeler, People):
            annotators = BackgroundLabeler(self.labeler, self.store, pace=self._pace, wanted=self._wanted)
        try:
            while self.progress.step < self.config.updates:
                self.halter.check()
                try:
                    self._act()
                    if (found := process.poll(self.progress.reward_version)) is not None:
                        self._adopt(found)
                    if annotators is not None and annotators.error is not None:
                        raise annotators.error
                    self._top_up()
                    if self._scorer is None:
                        self._wait_for_labels()
                        continue
                    self._update()
                except StoreUnavailable as error:  # the policy need not wait for the database
                    logger.warning("%s", error)
                    self.halter.wait(LOOK_EVERY)
        finally:
            process.stop()
            if annotators is not None:
                annotators.stop()

    def _run_batched(self) -> None:
        refits = Refits(self.job, self.rewards, self.store, policy=self.start_model)
        while self.progress.step < self.config.updates:
            self.collect_labels(self._wanted() or 0)
            self._adopt(refits.run())
            for _ in range(min(self.config.batched_updates, self.config.updates - self.progress.step)):
                self.halter.check()
                self._update()

    def collect_labels(self, wanted: int) -> None:
        """Asks until so many more labels are there; "can't tell" is none, so it may take more than one round."""
        until = self.store.label_count() + wanted
        if isinstance(self.labeler, People):
            while (missing := until - self.store.label_count()) > 0:
                self._ask(self.questions.missing(missing))
                self._tell("waiting for labels", f"The reward model is fitted after {missing} more answers.")
                self.halter.wait(LOOK_EVERY)
            return
        for _ in range(ROUNDS):
            if (missing := until - self.store.label_count()) <= 0:
                return
            if self.labeler.brings_questions:
                if self.labeler.label(self.store, missing) == 0:
                    return  # the file is through
                continue
            self._ask(missing)
            self.labeler.label(self.store, 2**31)

    def begin(self) -> None:
        """Goes on from the newest checkpoint, or makes version 0."""
        self._tell("starting", "The policy is opened.")
        found = self._saved.newest()
        if found is None:
            self.progress.policy_version = self._saved.next_version() - 1
            self._new_version(None)
        else:
            self.trainer.restore(found["trainer"])
            self.progress = Progress(**found["progress"])
            self.monitor.state = found["monitor"]
            self._refitted = known_reward(self.store, self.progress.reward_version)
            logger.info("Going on after update %d.", self.progress.step)
        self._refresh_labels()
        self.store.withdraw(older_than_policy=self.progress.policy_version)
        if self.config.mode == "async":
            self._top_up()  # people need not wait for what comes now
        ensure_start_responses(self.rewards, self.trainer)
        if (newest := newest_version(self.rewards)) is not None:
            self._adopt(newest, again=True)

    def _end(self, ending: Ending) -> None:
        self._checkpoint()
        self._tell("stopped", "All updates are done." if ending == "done" else f"The loop was {ending}.")
        save_models(self.output_dir, self.rewards, self.trainer)

    # ---- its parts

    def _update(self) -> None:
        """One update of the policy, and what is told about it."""
        self._tell("training", f"Update {self.progress.step + 1}: the policy writes, is scored and learns.")
        metrics = self.trainer.step(self.progress.step)
        self.progress.step += 1
        rollout = self.trainer.last_rollout
        assert rollout is not None
        assert self._scorer is not None
        row, raised = self.monitor.update(metrics, rollout, self._held_out)
        self._raised += raised
        self._refresh_labels()
        row |= {
            "step": self.progress.step,
            "policy_version": self.progress.policy_version,
            "reward_version": self.progress.reward_version,
            "labels": self.store.label_count(),
        }
        self.store.add_metrics([row])
        self._on_update(row)
        self._act()
        if self.progress.step - self.progress.version_step >= self.config.version_every:
            self._new_version(self._scorer)
        if self.progress.step % self.config.save_every == 0:
            self._checkpoint()

    def _adopt(self, refitted: Refitted, *, again: bool = False) -> None:
        """From here on the policy learns against this reward model, unless its sign is wrong.

        `again`: it was there before, so a wrong sign has stopped the loop once. Now the next one is waited for.
        """
        scorer, held_out = open_rewards(refitted, self.trainer)
        self._refresh_labels()
        fitted, _ = training_preferences([one for one in self._labels if one.event_id <= refitted.last_event])
        raised = self.monitor.check_sign(scorer, fitted, self.progress.step)
        is_new = refitted.number > self.progress.reward_version  # not so when a stopped session goes on
        if is_new:
            self.store.add_version(version_of(refitted, self.progress.step))
        if any(alarm.action == "stop" for alarm in raised):  # nothing learns from it
            self.progress.reward_version = refitted.number
            if again:
                logger.warning("The newest reward model still has the wrong sign: the next one is waited for.")
                return
            self._raised += raised
            self._act()
        if is_new:
            self.monitor.replace_rewards(scorer, held_out)
        self._scorer = self.trainer.scorer = scorer
        self._held_out = held_out
        if is_new and self.progress.step > self.progress.version_step:
            self._new_version(scorer)  # it has learned against the reward model before
        self.progress.reward_version = refitted.number
        self._refitted = refitted
        self.monitor.compare_win_rates(self._blind_pairs(), LogOdds(scorer), self.config.label_noise)
        self._raised += raised
        self._act()

    def _new_version(self, scorer: RewardModel | None, figures: dict[str, float] | None = None) -> None:
        """The policy as it is becomes a version, with `figures`, and questions are about it from now on."""
        number = self.progress.policy_version + 1
        won = win_rate(self._blind_pairs())
        version = Version(
            kind="policy",
            number=number,
            step=self.progress.step,
            labels=self._refitted.labels if self._refitted else 0,
            last_event=self._refitted.last_event if self._refitted else 0,
            figures=(figures or {}) | ({"win_rate": won.rate} if won and won.rate is not None else {}),
        )
        judge = self._held_out or scorer
        self.versions.add(version, judge, self._labels, self.monitor.figures)
        WIN_RATE.write(self.store, win_rate(self._blind_pairs()))
        self.progress.policy_version, self.progress.version_step = number, self.progress.step
        self.store.withdraw(older_than_policy=number)

    def _act(self) -> None:
        """Tells of the alarms that were raised, and does what they ask for: the gravest alone."""
        actions = {alarm.action for alarm in self._raised}
        back = "stop" not in actions and "roll_back" in actions and self._scorer is not None
        number = self._roll_back() if back else None
        for alarm in self._raised:
            if number is not None and alarm.action == "roll_back":
                then = f"The policy is back at version {number}; the KL coefficient is {self.trainer.kl_coef:g} now."
                alarm = dataclasses.replace(alarm, message=f"{alarm.message} {then}")
            logger.warning("Alarm after update %d, %s: %s", alarm.step, alarm.action.replace("_", " "), alarm.message)
            self.store.add_alarm(alarm)
        self._raised = []
        if "stop" in actions:
            raise Halted("stopped")

    def _roll_back(self) -> int:
        """Puts the policy back to the best version in which nothing was near an alarm.

        What led it astray is still there, so the KL penalty doubles.
        """
        assert self._scorer is not None
        number = self.versions.best(self._held_out or self._scorer, self._labels)
        self.versions.restore(number)
        self.monitor.rolled_back(self.versions.figures(number))
        self._new_version(self._scorer, {BACK_AT: float(number)})
        self.progress.rolled_back += 1
        self.trainer.kl_coef = self.config.init_kl_coef * 2 ** min(self.progress.rolled_back, MOST_DOUBLINGS)
        self._checkpoint()
        return number

    def _top_up(self) -> None:
        if not self.labeler.brings_questions:
            self._ask(self.questions.missing(self._wanted()))

    def _ask(self, count: int) -> None:
        if count > 0:
            scorer = self._scorer
            models = CurrentModels(
                generate=lambda prompts, seed: self.trainer.generate(prompts, seed=seed),
                generate_start=lambda prompts, seed: self.trainer.generate(prompts, seed=seed, reference=True),
                scorer=LogOdds(scorer) if scorer else None,
                policy_version=self.progress.policy_version,
                reward_version=self.progress.reward_version,
            )
            self.questions.ask(count, models)

    def _wanted(self) -> int | None:
        """Labels that are still wanted by now; None for as many as people give."""
        if self._schedule is None:
            return None
        due = self._schedule.due(self.progress.step, self.config.updates)
        return max(0, due - self.store.label_count())

    def _refresh_labels(self) -> None:
        """All labels that count now, and the win rate that follows from them."""
        last = self._labels[-1].event_id if self._labels else 0
        if self.store.last_event() == last:
            return
        self._labels = self.store.labels()
        WIN_RATE.write(self.store, win_rate(self._blind_pairs()))

    def _blind_pairs(self) -> list[Label]:
        return blind_pairs(self._labels, recent_versions(self.store.versions("policy")))

    def _wait_for_labels(self) -> None:
        count, first = self.store.label_count(), self.config.initial_labels
        if count < first:
            text = f"{count} of the {first} answers are there that the first reward model waits for."
            self._tell("waiting for labels", text)
        else:
            self._tell("refitting", f"The first reward model is fitted to {count} answers.")
        self.halter.wait(LOOK_EVERY)

    def _checkpoint(self) -> None:
        self._saved.save(
            self.progress.step,
            {
                "trainer": self.trainer.snapshot(),
                "progress": dataclasses.asdict(self.progress),
                "monitor": self.monitor.state,
            },
        )

    def _tell(self, state: LoopState, text: str) -> None:
        if text == self._told:
            return
        with contextlib.suppress(StoreUnavailable):  # the page is told the next time
            report_status(self.store, state, step=self.progress.step, text=text)
            self._told = text

    def start_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The language model as it began, and the tokenizer."""
        with self.trainer._reference.model() as frozen:
            return frozen.plain_model(), self.trainer.tokenizer
