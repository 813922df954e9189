"""Adaptation of a foundation model with few labels and little compute."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.adaptation.blending import blend as blend
    from vlm.adaptation.blending import soup as soup
    from vlm.adaptation.budgeted import Adaptation as Adaptation
    from vlm.adaptation.budgeted import adapt as adapt
    from vlm.adaptation.labelled import Labelled as Labelled
    from vlm.adaptation.labelled import read_labelled as read_labelled
    from vlm.adaptation.learned_prompt import learn_prompt as learn_prompt
    from vlm.adaptation.lora import AdapterSwitch as AdapterSwitch
    from vlm.adaptation.lora import attach as attach
    from vlm.adaptation.lora import save_peft as save_peft
    from vlm.adaptation.sweep import Sweep as Sweep
    from vlm.adaptation.sweep import sweep_alpha as sweep_alpha
    from vlm.adaptation.template_search import TemplateSearch as TemplateSearch
    from vlm.adaptation.template_search import search_templates as search_templates
