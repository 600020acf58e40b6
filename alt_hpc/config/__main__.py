"""`python -m alt_hpc.config > configs/schema.json`: what editors complete configs from."""

import json

from alt_hpc.config.schema import json_schema

print(json.dumps(json_schema(), indent=1))
