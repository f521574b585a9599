"""What a user asks for: the schema, and how recipes are read, changed, checked and written.

    schema      Recipe and its parts                       loading     load_recipe, read_recipe, build_recipe
    overrides   parse_override, apply_overrides            migration   migrate
    writing     to_yaml, json_schema                       mergekit    convert_mergekit

Nothing is imported here, so that reading a flag does not load torch.
"""
