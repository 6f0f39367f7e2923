#!/bin/sh
# sh examples/trainers/ms-swift.sh --model ... --dataset ... --output_dir ...
# Nothing in it is ours but the variable: `swift sft` with a base model in bitsandbytes' 4 bits.
: "${QLORA_EXT_ENABLE=layers}"
export QLORA_EXT_ENABLE
exec swift sft \
  --quant_method bnb --quant_bits 4 --bnb_4bit_compute_dtype float32 --torch_dtype float32 \
  --tuner_type lora --target_modules all-linear --lora_rank 8 --lora_alpha 16 --lora_dropout 0 \
  --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --learning_rate 1e-3 \
  --max_length 128 --logging_steps 1 --report_to none "$@"
