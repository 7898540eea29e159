"""Tuning towards cheerful words, as scripts for TRL 0.11 are written: a parser, two models, a data set, the loop."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser
from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler
from trl.import_utils import is_npu_available, is_xpu_available

tqdm.pandas()


@dataclass
class ScriptArguments:
    use_seq2seq: bool = field(default=False, metadata={"help": "whether to use seq2seq"})
    trust_remote_code: bool = field(default=False, metadata={"help": "Enable `trust_remote_code`"})
    use_peft: bool = field(default=False, metadata={"help": "whether to use peft"})
    lora_alpha: float | None = field(default=16, metadata={"help": "the lora alpha parameter"})
    lora_r: int | None = field(default=16, metadata={"help": "the lora r parameter"})
    output_dir: str = field(default="tuned", metadata={"help": "where the model goes"})


args, ppo_config = HfArgumentParser((ScriptArguments, PPOConfig)).parse_args_into_dataclasses()
model_class = AutoModelForSeq2SeqLMWithValueHead if args.use_seq2seq else AutoModelForCausalLMWithValueHead


def build_dataset(config, input_min_text_length=2, input_max_text_length=6):
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    sentences = ["the cat sees a bird and the dog", "a dog likes the old tree", "the sun finds a small red house"]
    ds = Dataset.from_dict({"text": sentences * 160, "label": [0, 1, 0] * 160})
    ds = ds.rename_columns({"text": "review"})
    ds = ds.filter(lambda x: len(x["review"]) > 10)
    input_size = LengthSampler(input_min_text_length, input_max_text_length)

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])[: input_size()]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    ds = ds.map(tokenize, batched=False)
    ds.set_format(type="torch")
    return ds


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


set_seed(ppo_config.seed)
dataset = build_dataset(ppo_config)
if not args.use_peft:
    ref_model = model_class.from_pretrained(ppo_config.model_name, trust_remote_code=args.trust_remote_code)
    peft_config = None
else:
    peft_config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        bias="none",
        task_type="SEQ_2_SEQ_LM" if args.use_seq2seq else "CAUSAL_LM",
    )
    ref_model = None
model = model_class.from_pretrained(
    ppo_config.model_name, trust_remote_code=args.trust_remote_code, device_map=None, peft_config=peft_config
)
tokenizer = AutoTokenizer.from_pretrained(ppo_config.model_name)
ppo_trainer = PPOTrainer(ppo_config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)

device = ppo_trainer.accelerator.device
if ppo_trainer.accelerator.num_processes == 1:
    if is_xpu_available():
        device = "xpu:0"
    elif is_npu_available():
        device = "npu:0"
    else:
        device = 0 if torch.cuda.is_available() else "cpu"
assert ppo_trainer.accelerator.state.deepspeed_plugin is None
assert Accelerator().is_main_process


def cheerfulness(texts):
    return [float(sum(word in ("good", "new", "sun", "gold") for word in text.split())) for text in texts]


generation_kwargs = {
    "min_length": -1,
    "top_k": 0.0,
    "top_p": 1.0,
    "do_sample": True,
    "pad_token_id": tokenizer.eos_token_id,
    "max_new_tokens": 5,
}
history = []
for _epoch, batch in tqdm(enumerate(ppo_trainer.dataloader)):
    query_tensors = batch["input_ids"]
    response_tensors, ref_response_tensors = ppo_trainer.generate(
        query_tensors, return_prompt=False, generate_ref_response=True, batch_size=16, **generation_kwargs
    )
    batch["response"] = tokenizer.batch_decode(response_tensors)
    batch["ref_response"] = tokenizer.batch_decode(ref_response_tensors)
    rewards = [torch.tensor(score) for score in cheerfulness(batch["response"])]
    batch["ref_rewards"] = [torch.tensor(score) for score in cheerfulness(batch["ref_response"])]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response", "ref_response", "ref_rewards"])
    history.append(stats)

ppo_trainer.save_pretrained(args.output_dir)
