"""Measurements: which engine is best here, and whether the answer can be trusted.

    anamorph bench quick                       the bundled model on all engines, in three minutes
    anamorph bench run SET --model FOLDER      a named set (`sets/`) or a TOML file; a stopped run goes on
    anamorph bench compare OLD NEW             what got slower; leaves with 3 if something did
    anamorph bench best [MODEL]                one line, which backend="auto" follows

`scenarios` expands data to cells, `runner` lets the arms of equal work take turns in fresh processes (`process`, `arm`,
`peers`), `parity` decides whether a cell may show a speed, `environment` whether the machine stood still, `records`
keeps raw samples, `statistics`, `summary` and `comparing` say what they mean, `report` and `plots` show it.
`full_size` makes checkpoints; `schedulers`, `quality`, `interop` and `snippets` measure what is not speed.
"""
