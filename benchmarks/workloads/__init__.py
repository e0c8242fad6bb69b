"""What the speed benchmark trains: one small class a workload, all by the template in `template`.

    template    what a workload is, and the rule of its margin
    synthetic   data that can be learned and need not be downloaded
    images      resnet18, airbench, dcgan
    text        gpt, nanogpt-char, nanogpt-tiny, bert, lstm
    tables      dlrm, dlrm-sparse, mlp
    catalogue   name -> workload

Every workload has a reduced size for tests (`small=True`), which nothing is measured on.
"""
