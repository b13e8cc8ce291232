"""The vocabulary that every other room speaks; it imports nothing of ours.

    expr      Expr: scores, epilogues, index arithmetic and predicates in one typed language
    evaluate  an Expr on torch tensors
    facts     what sympy can prove about the integer part of an Expr
    mask      which keys are kept, as an algebra
    intervals which tiles of a mask are empty, partly kept or full
    bias      additive terms, cheapest exact form first
    spec      Spec: what to compute. Schedule: how
    captured  a captured graph with the origins of its inputs
    site      what was found, in fx nodes
    rewrite   what replaces it
"""
