"""The tokenizer and the processor files of the model that sees, in the layout of SmolVLM.

Byte-level BPE. A word is a token with the space before it, a number of two digits is one token, and so is a fragment of a
plan such as ``","at":[``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from tools.demo_model.tokenizer import train_bpe

START, PAD, END, AROUND, GLOBAL, IMAGE = SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>",
)  # fmt: skip
MAX_LENGTH = 1024
_PATTERN = "|".join((
    r'\{"plan":\[\{"do":"pick","object":"',  # the start of a plan
    r'\{"(?:refuse|ask)":"|\{"at":\[',
    r'\]\},\{"do":"[a-z]+","object":"',  # from one step to the next
    r'","(?:at":\[|[a-z]+":")',  # from one argument to the next
    r'\]?\}\]\}|\]\}|"\}',  # the end
    r" ?\p{L}+|\p{N}{1,2}|\s+|[^\s\p{L}\p{N}]",
))  # fmt: skip
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
Piece = tuple[str, bool]  # text, and whether the model is to produce it


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    roles = ("System", "User", "Assistant")
    return train_bpe(chain(texts, roles * 100), vocab_size, _PATTERN, SPECIAL)


def prefix(system: str, picture: bool) -> tuple[str, str]:
    """Return the text before the picture's tokens and the text between them and the first question."""
    begin = f"{START}System:{system}{END}\nUser:" if system else f"{START}User:"
    return (begin + AROUND + GLOBAL, AROUND) if picture else (begin, "")


def pieces(turns: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    """The chat template from the first question on, for (question, answer) after (question, answer)."""
    for index, (question, answer) in enumerate(turns):
        lead = "\nUser:" if index else ""  # the end of the answer before it belongs to that answer
        yield f"{lead}{question}{END}\nAssistant:", False
        yield f"{answer}{END}", True


def save_processor(tokenizer: Tokenizer, directory: Path, image_size: int, image_tokens: int) -> None:
    """Write the files of the tokenizer, the chat template and the picture's processor, as transformers reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "SmolVLMProcessor", "model_max_length": MAX_LENGTH,
        "bos_token": START, "eos_token": END, "pad_token": PAD, "unk_token": None,
        "additional_special_tokens": [AROUND, GLOBAL, IMAGE], "fake_image_token": AROUND, "global_image_token": GLOBAL,
        "image_token": IMAGE, "end_of_utterance_token": END, "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"end_of_utterance_token": END, "fake_image_token": AROUND, "global_image_token": GLOBAL, "image_token": IMAGE},
    }  # fmt: skip
    pictures = {
        "image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"longest_edge": 2 * image_size}, "resample": 1, "do_image_splitting": False, "max_image_size": {"longest_edge": image_size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_pad": True,
    }  # fmt: skip
    processor = {"image_seq_len": image_tokens, "processor_class": "SmolVLMProcessor"}
    for name, value in (("tokenizer_config", config), ("preprocessor_config", pictures), ("processor_config", processor)):
        (directory / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
