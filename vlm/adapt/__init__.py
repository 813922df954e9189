"""Adaptation: a foundation model made good at a task with few labels and little compute."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.adapt.adaptation import Adaptation as Adaptation
    from vlm.adapt.adaptation import adapt as adapt
    from vlm.adapt.blending import blend as blend
    from vlm.adapt.blending import soup as soup
    from vlm.adapt.labelled import Labelled as Labelled
    from vlm.adapt.labelled import read_labelled as read_labelled
    from vlm.adapt.learned_prompt import learn_prompt as learn_prompt
    from vlm.adapt.lora import AdapterSwitch as AdapterSwitch
    from vlm.adapt.lora import attach as attach
    from vlm.adapt.lora import save_peft as save_peft
    from vlm.adapt.sweep import Sweep as Sweep
    from vlm.adapt.sweep import sweep_alpha as sweep_alpha
    from vlm.adapt.template_search import TemplateSearch as TemplateSearch
    from vlm.adapt.template_search import search_templates as search_templates
