"""FairASR in plain PyTorch. Reading order:

train.py -> model.py -> losses.py        the method of the paper, stage 1
conformer.py, audio.py                   the encoder and what it hears
finetune.py, text.py                     stage 2: CTC
evaluate.py, wer.py, report.py           stage 3: word error rate by group
embed.py                                 what can be read from the encoder's embeddings
data.py, runtime.py, checkpoint.py,      the manifest; processes, precision, logs; files;
decode.py                                a whole corpus through a model
"""
