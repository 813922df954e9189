"""Texts for comparing two tokenizers: captions of the web, and difficult strings."""

import random

_CAPTIONS = (
    "a photo of a golden retriever puppy playing in the snow.", "Two DOGS on the beach!",
    "LIVE: Paris - Lyon 3:1!!! Wow!", "What a view!", "!", "!!", "Yahoo! Answers",
    "wait... what?!", "Women's Running Shoes, Size 8.5 - Black/White (New)", "5!",
    "#1 Best-Seller!", "C++ & Rust?", "It’s a “beautiful” day in the neighbourhood",
    "‘Rock ’n’ roll’ poster – 24×36″", "Tom &amp; Jerry &lt;HD&gt; wallpaper",
    "R&amp;B &#39;90s &quot;hits&quot;", "caf&eacute; &copy 2020", "&nbsp;&nbsp;Buy now&hellip;",
    "Fish & Chips", "5 &lt; 6 &amp;amp; 7", "&#8220;quoted&#8221;",
    "It’s schÃ¶n, donâ€™t you think?", "cafÃ© â€œLe MÃ©tropoleâ€\x9d", "Â£20 â€“ Â©2019",
    "the ﬁrst ﬂight of the oﬃcial ﬂag", "Ａｌｂｕｍ　Ｃｏｖｅｒ（２０２０）！", "ｶﾀｶﾅ ﾃｽﾄ", "ﬆeﬅ",
    "naïve café, Straße in Köln, Übergröße", "una niña con un paraguas rojo",
    "un chat sur une table à côté", "ein Mann fährt auf einem Fahrrad", "três crianças à mesa",
    "dwóch mężczyzn idzie ulicą", "мальчик играет с мячом на траве", "Η ΓΑΤΑ ΤΟΥ ΣΙΣΥΦΟΣ",
    "İstanbul'da gün batımı", "IŞIK ışık", "木の下で眠る二匹の猫", "一只戴着红帽子的狗。",
    "고양이 두 마리가 소파에 있다", "قطة تجلس على الكرسي", "एक लड़की साइकिल चला रही है",
    "แมวสองตัวนอนบนโซฟา", "hai con mèo trên ghế", "två röda hus vid sjön",
    "🙂 happy birthday 🎂🎉", "👩‍👩‍👧 family in 🇫🇷 ❤️", "thumbs 👍🏽 up", "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "IMG_20190312_104355.jpg", "DSC_0042-2_edited.JPG", "https://example.com/?a=b&c=d#top",
    "@user #tag", "line one\nline two\ttabbed", "  leading and trailing  ", "double  spaces",
    "\u00a0no-break\u00a0", "zero\u200bwidth", "\ufeffbom", "soft\u00adhyphen", "bell\x07",
    "nul\x00", "line\u2028separator", "\r\n", "<start_of_text>", "<end_of_text>",
    "a <end_of_text> b", "!<end_of_text>", "<|startoftext|> x", "x <|endoftext|>", "</s>",
    "<s> a", "<pad>", "<eos>", "<bos>", "[CLS] dog [SEP]", "[PAD]", "<unk>", "<END_OF_TEXT>",
    "snake_case_name", "▁piece", "½ Ⅷ ² ﷺ", "1,234.56 €", "'S DON'T I'LL they're", "e\u0301 vs é",
    "ſ ẞ ŉ ǆ", "ᾳ\u0345", "a" * 400, "long text " * 90, "!" * 200, "🙂" * 90, "", " ",
)  # fmt: skip
_SPACES = (" ",) * 12 + ("  ", "\t", "\n", "\u00a0", "\u3000", "\u200b", "")
_MARKS = tuple("!!!!??..,,;:'\"“”‘’–—…()[]{}<>/\\|_*&%$#@+=~^`")


def sample_texts(count: int = 10_000, seed: int = 0) -> list[str]:
    """Return `count` texts, deterministic for a seed: the captions, then mixtures of their words.

    About one mixture in fourteen has random characters from U+0020 to U+D7FF.
    """
    chosen = random.Random(seed)
    texts: list[str] = list(_CAPTIONS[:count])
    words = [word for caption in _CAPTIONS if len(caption) < 100 for word in caption.split(" ")]
    while len(texts) < count:
        parts = []
        for _ in range(chosen.randint(1, 14)):
            word = chosen.choice(words)
            kind = chosen.random()
            if kind < 0.1:
                word = word.upper()
            elif kind < 0.2:
                word = word.capitalize()
            elif kind < 0.3:
                word += chosen.choice(_MARKS) * chosen.randint(1, 3)
            elif kind < 0.35:
                word = chosen.choice(_MARKS) + word
            elif kind < 0.36:
                word = "".join(chr(chosen.randint(0x20, 0xD7FF)) for _ in range(4))
            parts += [word, chosen.choice(_SPACES)]
        texts.append("".join(parts))
    return texts
