"""FairASR in plain PyTorch. Reading order:

train.py -> model.py -> losses.py        the method of the paper, stage 1
conformer.py, layers.py, audio.py        the encoder, what it is made of, and what it hears
finetune.py, text.py                     stage 2: CTC
evaluate.py, wer.py, stats.py,           stage 3: word error rate by group, intervals and tests
report.py, report_html.py
embed.py                                 what can be read from the encoder's embeddings
data.py, runtime.py, checkpoint.py,      the manifest; processes, precision, logs; files;
decode.py                                a whole corpus through a model
graphs.py                                a GPU's kernels recorded and replayed
nemo.py, download.py                     NVIDIA's archives; models from the network
"""
