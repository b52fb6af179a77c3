"""Every setting of training and evaluation, said once: its default, help, limits, and whether cards may show it.

A setting is a field of a dataclass, made by `foundation.settings.setting`. Flags, help, YAML files, checks, cards and
what is hidden on the way to the Hub come from there. Nothing here imports torch.
"""
