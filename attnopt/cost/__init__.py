"""What an attention will cost on a device: pure functions of shapes, masks and device facts.

    tiles      tiles that a mask visits, fully or partly
    work       what a Spec computes at given lengths, in numbers
    devices    facts about devices, from datasheets or measured
    makespan   when many tasks on few units are done
    gpu, cpu   predicted time of generated kernels
    plain      predicted time of what torch itself offers
    fit        fitting a CPU's coefficients to measured times; fit_gpu: those of a GPU kernel
    cpu_tiles  tiles that a CPU kernel can have
    choose     the best lowering and tile, and whether a rewrite pays

Nothing here touches a device: registers, spills and shared memory come in as data.
"""
