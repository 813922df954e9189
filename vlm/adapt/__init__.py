"""Adaptation: a foundation model made good at a task with few labels and little compute."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.adapt.lora import AdapterSwitch as AdapterSwitch
    from vlm.adapt.lora import attach as attach
    from vlm.adapt.lora import save_peft as save_peft
