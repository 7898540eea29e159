"""The first steps with TRL 0.7: one query, one response, one reward, and the pieces made by hand."""

import sys

import torch
from torch.optim import SGD
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.core import LengthSampler, respond_to_batch

name = sys.argv[1]
model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
model_ref = create_reference_model(model, num_shared_layers=1)
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.eos_token

ppo_config = PPOConfig(batch_size=1, mini_batch_size=1, log_with=None, adap_kl_ctrl=False)
optimizer = SGD(filter(lambda p: p.requires_grad, model.parameters()), lr=0.1)
lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
ppo_trainer = PPOTrainer(ppo_config, model, model_ref, tokenizer, optimizer=optimizer, lr_scheduler=lr_scheduler)

query_tensor = tokenizer.encode("the cat sees", return_tensors="pt")
response_tensor = respond_to_batch(model, query_tensor, txt_len=4)
train_stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], [torch.tensor(1.0)])

length = LengthSampler(2, 4)
sampled = ppo_trainer.generate(
    query_tensor[0],
    length_sampler=length,
    return_prompt=False,
    do_sample=True,
    top_k=0,
    pad_token_id=0,
    eos_token_id=-1,
)
second_stats = ppo_trainer.step([query_tensor[0]], [sampled.squeeze()], [torch.tensor([0.5])])
