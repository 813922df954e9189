"""Writes goldens of VisionTextDualEncoder, CLIPSeg, OWL-ViT and BLIP: small random models.

Run with the extra `peers` installed: python tests/weights/make_dual_encoders.py
"""

import pathlib
import shutil
from types import SimpleNamespace

import torch
from make_huggingface import TEXTS, images, randomise, small_vocabulary, tokenizer_files
from make_huggingface import write_outputs as write
from PIL import Image
from tokenizers import processors
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessorPil,
    RobertaConfig,
    RobertaModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
         "patch_size": 8}  # fmt: skip
VISION = SMALL | {"intermediate_size": 40}
SQUARE = {"height": 32, "width": 32}
CROP = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}


def vocabulary_of(kind):
    """A vocabulary with the special tokens of BERT, RoBERTa or CLIP, and their ids."""
    specials = {
        "bert": ["[PAD]", "[CLS]", "[SEP]"], "roberta": ["<s>", "<pad>", "</s>"], "clip": [],
    }[kind]  # fmt: skip
    vocabulary = small_vocabulary(specials)
    names = {
        "bert": ("[CLS]", "[PAD]", "[SEP]"), "roberta": ("<s>", "<pad>", "</s>"),
        "clip": ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>"),
    }[kind]  # fmt: skip
    if kind == "clip":
        vocabulary.add_special_tokens(list(dict.fromkeys(names)))
    bos, pad, eos = map(vocabulary.token_to_id, names)
    vocabulary.post_processor = processors.TemplateProcessing(
        single=f"{names[0]} $A {names[2]}", special_tokens=[(names[0], bos), (names[2], eos)]
    )
    return vocabulary, bos, pad, eos


def text_of(kind, vocabulary, bos, pad, eos):
    text = {
        "vocab_size": vocabulary.get_vocab_size(), "hidden_size": 24, "intermediate_size": 37,
        "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 13,
        "pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos,
    }  # fmt: skip
    return text | {"max_position_embeddings": 15} if kind == "roberta" else text


def record(name, model, processor, kind, made, seed, embed):
    vocabulary, _, pad, eos = made
    randomise(model, seed)
    model.eval()
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer_files(folder, vocabulary, "PreTrainedTokenizerFast", pad, eos)
    raw = images(seed)
    pixels = processor([Image.fromarray(i) for i in raw], return_tensors="pt")["pixel_values"]
    vocabulary.enable_padding(length=13, pad_id=pad, pad_token=vocabulary.id_to_token(pad))
    vocabulary.enable_truncation(13)
    encoded = vocabulary.encode_batch(TEXTS)
    tokens = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    with torch.no_grad():
        write(folder, raw, TEXTS, pixels, tokens, embed(model, pixels, tokens, mask))


def embed(model, pixels, tokens, mask):
    return model(pixel_values=pixels, input_ids=tokens, attention_mask=mask)


def dual_encoder(name, vision, processor, kind, seed):
    made = vocabulary_of(kind)
    text = text_of(kind, *made)
    towers = {
        "bert": lambda: BertModel(BertConfig(**text)),
        "roberta": lambda: RobertaModel(RobertaConfig(**text)),
        "clip": lambda: CLIPTextModel(CLIPTextConfig(**text)),
    }
    tower = towers[kind]()
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, tower.config, projection_dim=20
    )
    model = VisionTextDualEncoderModel(config, vision, tower)
    record(name, model, processor, kind, made, seed, embed)


def of_clip(model, pixels, tokens, mask):
    return embed(model.clip, pixels, tokens, mask)


def of_owl(model, pixels, tokens, mask):
    return embed(model.owlvit, pixels, tokens, mask)


def of_blip(model, pixels, tokens, mask):
    cosines = model(
        pixel_values=pixels, input_ids=tokens, attention_mask=mask, use_itm_head=False
    ).itm_score
    image = model.vision_proj(model.vision_model(pixels).last_hidden_state[:, 0])
    text = model.text_encoder(tokens, attention_mask=mask).last_hidden_state[:, 0]
    return SimpleNamespace(
        image_embeds=image, text_embeds=model.text_proj(text), logits_per_image=cosines
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(**VISION))
    dual_encoder("hf_vt_clip_roberta", clip, CLIPImageProcessorPil(**CROP), "roberta", 21)
    vit = ViTModel(ViTConfig(**VISION))
    dual_encoder("hf_vt_vit_bert", vit, ViTImageProcessorPil(size=SQUARE), "bert", 22)
    small = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}
    dino = Dinov2Model(Dinov2Config(**SMALL))
    dual_encoder("hf_vt_dino_clip", dino, BitImageProcessorPil(**small), "clip", 23)
    made = vocabulary_of("clip")
    text = text_of("clip", *made)
    model = CLIPSegForImageSegmentation(
        CLIPSegConfig(
            text_config=text, vision_config=VISION, projection_dim=16, extract_layers=[0, 1],
            reduce_dim=8, decoder_num_attention_heads=2, decoder_intermediate_size=8,
        )
    )  # fmt: skip
    larger = ViTImageProcessorPil(size={"height": 40, "width": 40}, resample=2)
    record("hf_clipseg", model, larger, "clip", made, 24, of_clip)
    made = vocabulary_of("clip")
    config = OwlViTConfig(text_config=text, vision_config=VISION, projection_dim=24)
    owl = OwlViTImageProcessorPil(size=SQUARE)
    record("hf_owlvit", OwlViTForObjectDetection(config), owl, "clip", made, 25, of_owl)
    made = vocabulary_of("bert")
    text = text_of("bert", *made) | {"encoder_hidden_size": 24}
    config = BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=16)
    blip = BlipImageProcessorPil(size=SQUARE)
    record("hf_blip", BlipForImageTextRetrieval(config), blip, "bert", made, 26, of_blip)
