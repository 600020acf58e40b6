"""`python -m alt_hpc.config > configs/schema.json`: what editors complete configs from."""

import json

from alt_hpc.config import Config

print(json.dumps(Config.model_json_schema(), indent=1))
