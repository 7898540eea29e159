"""A user's script, for type checkers: test_public_api runs mypy over it; it is never executed.

Each `type: ignore` marks a mistake that mypy must find, since it reports one that is unused.
"""

from pathlib import Path

from deep_rlhf import (
    BestOfN,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    Preference,
    ReinforcePlusPlusConfig,
    ReinforcePlusPlusTrainer,
    RewardConfig,
    RewardModel,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    Session,
    SessionConfig,
    SFTConfig,
    Store,
    TRPOConfig,
    TRPOTrainer,
    UserError,
    load_preferences,
    load_prompts,
    train_dpo,
    train_reward_model,
    train_sft,
)


def correct_calls(folder: Path) -> tuple[list[Preference], float]:
    prompts, rows = load_prompts("prompts.jsonl", split="train")
    kept: int = rows.kept
    preferences, _ = load_preferences("pairs.jsonl", split="train")
    reward_config = RewardConfig(output_dir=str(folder / "reward"), ensemble_size=4, num_train_epochs=kept)
    result = train_reward_model(reward_config, "gpt2", None, preferences, preferences[:10])
    dpo = train_dpo(DPOConfig(output_dir=str(folder / "dpo")), "gpt2", None, preferences, preferences[:10])
    accuracy: float = dpo.metrics["accuracy"]
    config = PPOConfig(steps=256, learning_rate=1e-6, output_dir=str(folder))
    trainer = PPOTrainer(config, prompts=prompts, reward=result.model)
    trainer.train()
    trainer.save(folder / "model")
    texts: list[str] = trainer.generate(prompts[:4], seed=1)
    model = RewardModel.load(folder / "reward")
    scores: list[float] = model.score(prompts[:4], texts).mean(1).tolist()
    try:
        with Store(folder / "labels.db") as store:
            store.label_count()
    except UserError as error:
        print(error)  # noqa: T201
    return preferences, scores[0] + accuracy


def mistakes() -> None:
    PPOConfig(nonsense=1)  # type: ignore[call-arg]
    TRPOConfig(nonsense=1)  # type: ignore[call-arg]
    RLOOConfig(nonsense=1)  # type: ignore[call-arg]
    GRPOConfig(nonsense=1)  # type: ignore[call-arg]
    ReinforcePlusPlusConfig(nonsense=1)  # type: ignore[call-arg]
    SFTConfig(nonsense=1)  # type: ignore[call-arg]
    RewardConfig(nonsense=1)  # type: ignore[call-arg]
    DPOConfig(nonsense=1)  # type: ignore[call-arg]
    SessionConfig(nonsense=1)  # type: ignore[call-arg]
    PPOConfig(steps="many")  # type: ignore[arg-type]
    PPOTrainer(PPOConfig(), nonsense=1)  # type: ignore[call-arg]
    TRPOTrainer(TRPOConfig(), nonsense=1)  # type: ignore[call-arg]
    RLOOTrainer(RLOOConfig(), nonsense=1)  # type: ignore[call-arg]
    GRPOTrainer(GRPOConfig(), nonsense=1)  # type: ignore[call-arg]
    ReinforcePlusPlusTrainer(ReinforcePlusPlusConfig(), nonsense=1)  # type: ignore[call-arg]
    RewardTrainer(nonsense=1)  # type: ignore[call-arg]
    DPOTrainer(nonsense=1)  # type: ignore[call-arg]
    Session(SessionConfig(), nonsense=1)  # type: ignore[call-arg]
    Store("labels.db", nonsense=1)  # type: ignore[call-arg]
    BestOfN(nonsense=1)  # type: ignore[call-arg]
    RewardModel.load("folder", nonsense=1)  # type: ignore[call-arg]
    Preference(prompt="", a="", b="", nonsense=1)  # type: ignore[call-arg]
    load_prompts("prompts.jsonl", nonsense=1)  # type: ignore[call-arg]
    load_preferences("pairs.jsonl", nonsense=1)  # type: ignore[call-arg]
    train_sft(nonsense=1)  # type: ignore[call-arg]
    train_dpo(nonsense=1)  # type: ignore[call-arg]
    train_reward_model(nonsense=1)  # type: ignore[call-arg]
    Store("labels.db").no_such_method()  # type: ignore[attr-defined]
    _ = load_prompts("prompts.jsonl", split="train")[1].no_such_field  # type: ignore[attr-defined]
