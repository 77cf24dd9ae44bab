"""Which neurons of a protein encoder carry what it knows about enzymes, and where they are.

The protocol is ours (esm_knowledge_neurons.md section 5) and never the paper's (Nori et al. 2023, arXiv 2312.10770), of
which only the claims of the abstract are known here.
"""
