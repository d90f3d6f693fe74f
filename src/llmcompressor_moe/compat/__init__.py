"""Every use of a private or patched name of the libraries below us: one package or module for each of them.

Private is a name of theirs that starts with an underscore. A patch is an assignment onto one of their classes or
modules. Both can break with any release, so nothing outside of this package does either (`tests/test_compat.py`
walks the sources), and every entry says what upstream does and why that does not do. The tests fail when a name is
gone, when it takes other arguments, or when upstream no longer needs the entry. ``HOLDS_FOR`` in each package says
for which versions that was checked.

Names that count as public, because models and modules of others have to define or read them:

- of a transformers model or config: ``_no_split_modules``, ``_keep_in_fp32_modules``,
  ``_keep_in_fp32_modules_strict``, ``_keys_to_ignore_on_save``, ``_keys_to_ignore_on_load_unexpected``,
  ``_keys_to_ignore_on_load_missing``,
  ``_name_or_path``
- of a model class of our own, to define them and to call the one that they extend: ``_no_split_modules``,
  ``_can_record_outputs``, ``_init_weights``
- of torch: ``_parameters``, ``_buffers``, ``_modules``, ``_forward_hooks``, ``_forward_pre_hooks``,
  ``_non_persistent_buffers_set`` of a module, ``_last_lr`` of a learning-rate schedule
"""
