"""Vision towers, text tower, dual encoder, and named sizes."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from vlm.models import flops as flops
    from vlm.models import recipes as recipes
    from vlm.models import variants as variants
    from vlm.models.dual_encoder import DualEncoder as DualEncoder
    from vlm.models.text import TextTower as TextTower
    from vlm.models.towers import vision_tower as vision_tower
    from vlm.models.vit import ViTTower as ViTTower
