"""What people are asked: actively selected questions, and a few that measure annotators and the policy."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from deep_rlhf.algorithms.online.prompts import PromptWalk
from deep_rlhf.feedback.loop.config import SessionConfig
from deep_rlhf.feedback.loop.label_log import LabelLog
from deep_rlhf.feedback.questions.acquisition import select
from deep_rlhf.feedback.questions.candidates import (
    Candidate,
    Generate,
    rewards_of,
    sample_candidates,
    win_rate_pairs,
)
from deep_rlhf.feedback.questions.gold import read_gold
from deep_rlhf.feedback.records import FOR_LABEL, Comparison, Label, Reason
from deep_rlhf.feedback.state import QUESTION_CURSOR, QuestionCursor
from deep_rlhf.feedback.store import Store
from deep_rlhf.types import Scorer

LABELS_BEFORE_REPEAT = 10  # labels that must follow a label before its question is repeated
ACTIVE_WINDOW = 100  # who gave one of the newest labels counts as active
QUESTION_SEEDS = 2**33  # added to the seed, so that questions come in another order than the policy's own prompts
QUESTIONS_PER_PERSON = 3  # to keep waiting for each active annotator


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentModels:
    """The models that questions are about, and their versions."""

    generate: Generate  # the policy
    generate_start: Generate  # the start policy
    scorer: Scorer | None  # the reward model in log-odds; None before there is one
    policy_version: int
    reward_version: int


class Questions:
    """Adds questions to the store, and keeps its position there, so that a restarted loop asks nothing twice."""

    def __init__(
        self,
        config: SessionConfig,
        store: Store,
        prompts: Sequence[str],
        held_out: Sequence[str],
        *,
        labels: LabelLog | None = None,
    ) -> None:
        """`held_out`: prompts of blind pairs. Raises DataError if the gold questions cannot be read."""
        self.config, self.store = config, store
        self._log = labels or LabelLog(store)
        self._prompts = PromptWalk(prompts, seed=config.seed + QUESTION_SEEDS)
        self._held_out = PromptWalk(held_out, seed=config.seed + QUESTION_SEEDS + 1) if held_out else None
        self._all_gold = read_gold(config.gold_questions) if config.gold_questions else []
        self._load()

    def _load(self) -> None:
        """Reads from the store what was asked so far."""
        self._cursor = QUESTION_CURSOR.read(self.store) or QuestionCursor()
        self._repeated = {one.repeat_of for one in self.store.asked("repeat")}  # ids of questions that were repeated
        asked = {(one.prompt, one.responses) for one in self.store.asked("gold")} if self._all_gold else set()
        self._gold = [one for one in self._all_gold if (one.prompt, one.responses) not in asked]  # still to be asked
        self._is_loaded = True

    def missing(self, wanted: int | None) -> int:
        """How many more questions to add now; `wanted` is the number of labels still wanted, None for no limit.

        Only questions that nobody has seen count as waiting: the others may be of no use to the people who are active,
        who have skipped them, or answered them while a second person is awaited.
        """
        self._log.refresh()
        ahead = max(self.config.questions_ahead, QUESTIONS_PER_PERSON * len(self._active_annotators()))
        ahead = ahead if wanted is None else min(ahead, wanted)
        return max(0, ahead - self.store.unseen())

    def ask(self, count: int, models: CurrentModels) -> list[int]:
        """Adds `count` questions to the store (fewer if sampled responses are all equal) and returns their ids.

        The questions and the position after them are written together: whatever interrupts it, nothing is asked twice
        and nothing left out.
        """
        self._log.refresh()
        if not self._is_loaded:
            self._load()
        self._is_loaded = False  # until the store has everything: what interrupts it may come before or after that
        rng = random.Random(f"{self.config.seed}/questions/{self._next_draw()}")
        kinds = [self._kind(rng, models) for _ in range(count)]
        asked = self._win_rate_questions(kinds.count("win_rate"), models, rng)
        asked += self._repeats(kinds.count("repeat"), models)
        asked += self._gold_questions(kinds.count("gold"), models)
        asked += self._label_questions(count - len(asked), models, rng)
        rng.shuffle(asked)
        added = self.store.add(asked, values={QUESTION_CURSOR.key: QUESTION_CURSOR.encode(self._cursor)})
        self._is_loaded = True
        return added

    def _kind(self, rng: random.Random, models: CurrentModels) -> str:
        """Drawn at random, so that the shares are right however few questions are asked at a time."""
        config, draw = self.config, rng.random()
        shares = {
            "gold": config.gold_share if self._gold else 0.0,
            "repeat": config.repeat_share,
            "win_rate": config.win_rate_share if models.policy_version > 0 and self._held_out else 0.0,
        }
        for kind, share in shares.items():
            if draw < share:
                return kind
            draw -= share
        return "label"

    def _label_questions(self, count: int, models: CurrentModels, rng: random.Random) -> list[Comparison]:
        """Questions whose labels the reward model learns from."""
        if count == 0:
            return []
        config, responses = self.config, self.config.ranked_responses
        at_random = models.scorer is None or config.choose_by == "random"  # then more samples would be wasted
        groups = sample_candidates(
            models.generate,
            self._next_prompts(count),
            samples=responses if at_random else config.samples_per_prompt,
            responses=responses,
            seed=self._next_seed(),
        )
        if models.scorer is None:
            return [self._question(group[0], models, "initial", None, rng) for group in groups if group]
        candidates = [candidate for group in groups for candidate in group]
        if not candidates:
            return []
        selected = select(
            rewards_of(candidates, models.scorer),
            count,
            rule=config.choose_by,
            random_share=config.random_share,
            generator=torch.Generator().manual_seed(self._next_seed()),
            label_noise=config.label_noise,
        )
        is_pair = responses == 2
        return [
            self._question(candidates[one.index], models, one.reason, one.predicted if is_pair else None, rng)
            for one in selected
        ]

    def _question(
        self, candidate: Candidate, models: CurrentModels, reason: Reason, predicted: float | None, rng: random.Random
    ) -> Comparison:
        overlaps = len(self._active_annotators()) > 1 and rng.random() < self.config.overlap_share
        return Comparison(
            prompt=candidate.prompt,
            responses=candidate.responses,
            why_selected=reason,
            policy_version=models.policy_version,
            reward_version=models.reward_version,
            predicted=predicted,
            priority=float(models.policy_version),
            overlap=2 if overlaps else 1,
        )

    def _win_rate_questions(self, count: int, models: CurrentModels, rng: random.Random) -> list[Comparison]:
        """Blind pairs: the policy against the start policy on held-out prompts, on random sides."""
        if count == 0 or self._held_out is None:
            return []
        found: list[Comparison] = []
        start = self._cursor.held_out
        self._cursor = replace(self._cursor, held_out=start + count)
        prompts = self._held_out.between(start, start + count)
        pairs = win_rate_pairs(models.generate, models.generate_start, prompts, seed=self._next_seed())
        for prompt, now, before in pairs:
            pair = [(now, models.policy_version), (before, 0)]
            rng.shuffle(pair)
            found.append(
                Comparison(
                    prompt=prompt,
                    responses=tuple(text for text, _ in pair),
                    why_selected="win_rate",
                    policy_version=models.policy_version,
                    reward_version=models.reward_version,
                    writers=tuple(version for _, version in pair),
                    priority=float(models.policy_version),
                )
            )
        return found

    def _gold_questions(self, count: int, models: CurrentModels) -> list[Comparison]:
        """The next gold questions, with the priority of questions about the current policy."""
        gold, self._gold = self._gold[:count], self._gold[count:]
        return [replace(question, priority=float(models.policy_version)) for question in gold]

    def _repeats(self, count: int, models: CurrentModels) -> list[Comparison]:
        """Earlier questions of active annotators, with the responses in reverse order."""
        active = self._active_annotators()
        known = [
            label
            for label in self._local_labels()[:-LABELS_BEFORE_REPEAT]
            if label.choice in ("a", "b", "tie")
            and label.annotator in active
            and label.comparison.why_selected in FOR_LABEL
            and label.comparison_id not in self._repeated
        ]
        drawn = random.Random(self._next_seed()).sample(known, min(count, len(known)))
        self._repeated |= {label.comparison_id for label in drawn}
        return [
            Comparison(
                prompt=label.comparison.prompt,
                responses=label.comparison.responses[::-1],
                why_selected="repeat",
                policy_version=label.comparison.policy_version,
                reward_version=label.comparison.reward_version,
                priority=float(models.policy_version),
                repeat_of=label.comparison_id,
            )
            for label in drawn
        ]

    def _active_annotators(self) -> set[str]:
        return {label.annotator for label in self._local_labels()[-ACTIVE_WINDOW:]}

    def _local_labels(self) -> list[Label]:
        """Labels given here; the annotators of imported labels are not present."""
        return [label for label in self._log.labels if not label.imported]

    def _next_prompts(self, count: int) -> list[str]:
        start = self._cursor.prompts
        self._cursor = replace(self._cursor, prompts=start + count)
        return self._prompts.between(start, start + count)

    def _next_draw(self) -> int:
        self._cursor = replace(self._cursor, draws=self._cursor.draws + 1)
        return self._cursor.draws

    def _next_seed(self) -> int:
        """Another seed for each use, unlikely to be near the seeds of the updates."""
        return (self.config.seed * 7_368_787 + self._next_draw() * 15_485_863 + 2**31) % 2**32
