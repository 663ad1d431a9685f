"""Train on conversations, with a system message and several turns, and ask the trained model.

    python examples/conversations.py                                              a tiny random model, some seconds
    python examples/conversations.py --model HuggingFaceTB/SmolLM2-135M-Instruct  a real one, with its own template

The prompt ends with the user's turn; chosen and rejected are the assistant's. The model's chat template renders all.
"""

import argparse

from orpo import ORPOConfig, ORPOTrainer
from orpo.demo.model import build_model, train_tokenizer
from orpo.generation import generate

SYSTEM = {"role": "system", "content": "You answer in one friendly sentence."}
TALKS = (
    ("Can you lend me a pen?", "Of course, here it is!", "No."),
    ("Is it raining?", "Yes, so take an umbrella with you!", "Look outside."),
    ("How long does an egg boil?", "Eight minutes, then cold water!", "Long."),
    ("Where is the station?", "Straight on, five minutes from here!", "I do not know."),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def say(role, content):
    return {"role": role, "content": content}


pairs = []
for question, kind, rude in TALKS:
    pairs.append(
        {"prompt": [SYSTEM, say("user", question)]}
        | {"chosen": [say("assistant", kind)], "rejected": [say("assistant", rude)]}
    )
    # The same after another turn: an answer given before is a part of the prompt.
    before = [SYSTEM, say("user", "Hello!"), say("assistant", "Good morning!"), say("user", question)]
    pairs.append({"prompt": before, "chosen": [say("assistant", kind)], "rejected": [say("assistant", rude)]})

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="a folder or a name on the hub, of a chat model; default: a tiny random model")
parser.add_argument("--output_dir", default="conversations-out")
parser.add_argument("--max_steps", type=int, default=40)
options = parser.parse_args()

if options.model is None:
    texts = [message["content"] for row in pairs for side in ("prompt", "chosen", "rejected") for message in row[side]]
    tokenizer = train_tokenizer(texts, vocab_size=512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_end|>"
    model, learning_rate = build_model(tokenizer, seed=0), 1e-3
else:
    tokenizer, model, learning_rate = None, options.model, 2e-5

args = ORPOConfig(
    output_dir=options.output_dir,
    max_steps=options.max_steps,
    learning_rate=learning_rate,
    per_device_train_batch_size=4,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
trainer = ORPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
trainer.train()
trainer.save_model()
question = [SYSTEM, say("user", TALKS[0][0])]
(answer,) = generate(trainer.model, trainer.processing_class, [question], max_new_tokens=32)
print(f"{TALKS[0][0]} {answer}")
