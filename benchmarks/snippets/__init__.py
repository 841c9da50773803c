"""Whether the snippets of diffusers' documentation run with `diffusers` replaced by `anamorph`, beside itself.

    python -m anamorph.benchmarks.snippets SPEC_FILE [--library anamorph] [--chapters quicktour loading] [--out FILE]

SPEC_FILE is the documentation as one text, each page after a heading and its address; it does not come with this
package. `reading` finds the code blocks of a chapter, `rules` says as data which are left out and what is changed in
the others, `cache` fills a local hub cache with tiny random checkpoints (`checkpoints`) and pictures under the names
that the snippets use, and `running` executes a chapter's blocks in order, in one namespace and one process.
"""
