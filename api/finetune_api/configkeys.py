"""Which keys the files of a model may have: nothing else in them is believed, since libraries act upon what they find.

What would run code of the model's own, or fetch some, is refused by its name; any other key that is not listed is
refused too, so that a library's next invention is not believed either.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from finetune_api.failures import FineTuneError, Reason

_FREE = {"id2label", "label2id", "task_specific_params", "vocabulary_map", "rank_pattern", "alpha_pattern"}
"""Objects whose keys are data."""
_CODE = {
    "auto_map": "asks to run the model's own code, which is never done; use a supported family",
    "custom_generate": "asks to run the model's own code, which is never done",
    "trust_remote_code": "asks to run the model's own code, which is never done",
    "_attn_implementation_internal": "names an implementation of attention, which may be code from a hub; remove it",
    "_attn_implementation": "names an implementation of attention, which may be code from a hub; remove it",
    "attn_implementation": "names an implementation of attention, which may be code from a hub; remove it",
    "auto_mapping": "names classes to import, which is never done; remove it",
    "megatron_config": "names a module to import, which is never done; remove it",
    "tokenizer_kwargs": "says how a tokenizer is fetched, which is never done; remove it",
}


def check_config(config: Mapping[str, Any], uri: str) -> None:
    """config.json. Raises ModelInvalid with the key."""
    _check_code(config, uri)
    for path, key in _keys(config):
        if key not in CONFIG_KEYS:
            text = f"{uri}: found the key `{path}`, which no configuration of a known family has; remove it"
            raise FineTuneError(Reason.MODEL_INVALID, text)


def check_adapter_config(config: Mapping[str, Any], uri: str) -> None:
    """adapter_config.json, where what is empty counts as absent. Raises ModelInvalid with the key."""
    said = {key: value for key, value in config.items() if value not in (None, False, "", [], {})}
    _check_code(said, uri)
    if unknown := sorted(said.keys() - ADAPTER_KEYS):
        text = f"{uri}: found the key `{unknown[0]}`, by which no adapter is made here; remove it"
        raise FineTuneError(Reason.MODEL_INVALID, text)


def check_beside(config: Mapping[str, Any], uri: str) -> None:
    """tokenizer_config.json and generation_config.json, which have too many keys to list. Raises ModelInvalid."""
    _check_code(config, uri)


def _check_code(config: Mapping[str, Any], uri: str) -> None:
    for path, key in _keys(config):
        if key in _CODE:
            raise FineTuneError(Reason.MODEL_INVALID, f"{uri}: `{path}` {_CODE[key]}")


def _keys(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every key at any depth, with the way to it."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            own = f"{path}.{key}" if path else str(key)
            yield own, str(key)
            if key not in _FREE:
                yield from _keys(member, own)
    elif isinstance(value, list):
        for member in value:
            yield from _keys(member, path)


_ADAPTER = """
alpha_pattern base_model_name_or_path bias encoder_hidden_size exclude_modules fan_in_fan_out feedforward_modules
inference_mode init_ia3_weights init_lora_weights init_weights layer_replication layers_pattern layers_to_transform
lora_alpha lora_bias lora_dropout megatron_core modules_to_save num_attention_heads num_layers
num_transformer_submodules num_virtual_tokens peft_type peft_version prefix_projection prompt_tuning_init
prompt_tuning_init_text qalora_group_size r rank_pattern revision runtime_config target_modules target_parameters
task_type token_dim tokenizer_name_or_path trainable_token_indices use_dora use_qalora use_rslora
"""
_CONFIG = """
H_cycles L_bp_cycles L_cycles _commit_hash _from_model_config _name_or_path _num_labels _remove_final_layer_norm
activation activation_dropout activation_function activation_sparsity_pattern adapter_layer_norm adapter_rank
adapter_reduction_factor adapter_reuse_layer_norm add_bias_linear add_cross_attention add_out_norm afn alibi
altup_active_idx altup_coef_clip altup_correct_scale altup_num_inputs apply_residual_connection_post_layernorm
apply_spec_augment architectures asm attention_bias attention_chunk_size attention_dropout attention_factor
attention_head_dim attention_head_size attention_heads attention_hidden_size attention_in_multiplier
attention_k_eq_v attention_multiplier attention_out_bias attention_out_multiplier attention_probs_dropout_prob
attention_softmax_in_fp32 attention_type attention_types attention_value_scale attention_window_size attn_config
attn_layer_indices attn_layer_offset attn_layer_period attn_layers attn_logit_softcapping attn_pdrop attn_scale
attn_temperature_tuning attn_type audio_chunk_size audio_config audio_encoder audio_encoder_config audio_merge_size
audio_soft_tokens_per_image audio_token_id audio_vocab_size autocast_kernel_dtype aux_loss_coef axial_norm_std
axial_pos_embds axial_pos_embds_dim axial_pos_shape backbone_hidden_size bad_words_ids begin_suppress_tokens
beta_fast beta_slow bi_data bias block_auto_adjust_ff_dim block_ffn_dim_multiplier block_multiple_of block_size
block_types boa_token_id boi_token_id boi_token_index bos_index bos_token_id cache_implementation causal cca_time0
cca_time1 centroid_intermediate_top_k chain_hidden_post_norm chroma_length chunk_size chunk_size_feed_forward
chunk_size_lm_head chunked_attention chunkwise_kernel clamp_len classifier_activation classifier_bias
classifier_dropout classifier_dropout_prob classifier_proj_size clip_qkv cls_token_id compress_rates
compress_rope_theta concat_input context_length conv1d_width conv_L_cache conv_bias conv_kernel conv_kernel_size
cross_attention_hidden_size cross_attn_k d_head d_inner d_model d_rel decoder decoder_attention_heads decoder_bias
decoder_config decoder_ffn_dim decoder_layerdrop decoder_layers decoder_sparse_step decoder_start_token_id
decoder_vocab_size default_language dense_intermediate_size depth_decoder_config dff dim_ff dim_head dim_model_base
disable_ngram_loss diversity_penalty do_layer_norm_before do_sample dropout dropout_p dtype early_stopping emb_dim
emb_pdrop embd_pdrop embed_dropout embed_init_std embedding_dim embedding_dropout embedding_fraction
embedding_initializer_range embedding_multiplier embedding_scale embedding_size enable_bias enable_moe_block
enable_moe_fp32_combine enable_pronunciation enable_shape encoder_attention_heads encoder_config encoder_ffn_dim
encoder_hash_byte_group_nb_functions encoder_hash_byte_group_size encoder_hash_byte_group_vocab encoder_layerdrop
encoder_layers encoder_no_repeat_ngram_size end_n_top eoa_token_id eoa_token_index eod_token_id eoi_token_id
eoi_token_index eos_index eos_token_id eps expand expansion_ratio expert_ffn_hidden_size expert_layer_offset
expert_layer_period expert_selection_fn exponential_decay_length_penalty factor feed_forward_size ff_activation
ffn_config ffn_dim ffn_hidden_size ffn_proj_factor ffn_round_up_to_multiple_of final_logit_softcapping
finetuning_task first_k_dense_replace floor_scale forced_bos_token_id forced_eos_token_id full_attention
full_attn_alpha_factor full_attn_beta_factor full_attn_idxs gate_soft_cap gated_norm_rank gating gelu_activation
global_attn_every_n_layers global_config gradient_checkpointing hash_seed hc_count hc_eps hc_lowrank hc_magnitude
hc_mult hc_sinkhorn_iters head_dim heads_per_ngram hidden_act hidden_activation hidden_dropout hidden_dropout_prob
hidden_mamba_act hidden_size hidden_size_per_layer_input high_freq_factor id2label image_seq_length image_size
image_token_id image_token_index index_block_size index_head_dim index_local_blocks index_n_heads index_topk
index_topk_blocks indexer_budget indexer_compress_ratio indexer_head_dim indexer_kv_heads indexer_n_heads
indexer_types inference_state_dtype init_device init_std initializer_cutoff_factor initializer_factor
initializer_range input_embedding_size input_jitter_noise interleave_moe_layer_step intermediate_multiple_size
intermediate_size intermediate_size_mlp is_decoder is_encoder is_encoder_decoder is_moe kda_lower_bound
kda_safe_gate keep_window_size key_multiplier kv_channels kv_lora_rank label2id lambda_std_dev lang_id languages
laurel_rank layer_group_size layer_norm_elementwise_affine layer_norm_eps layer_norm_epsilon layer_rope_theta
layer_types layerdrop layernorm_embedding layers_block_type learnable_sink_init learned_pos_emb length_penalty
linear_a_log_max linear_a_log_min linear_allow_neg_eigval linear_attention linear_attn_alpha_factor
linear_attn_beta_factor linear_conv_kernel_dim linear_dt_init_floor linear_dt_max linear_dt_min linear_head_dim
linear_key_head_dim linear_num_heads linear_num_key_heads linear_num_value_heads linear_value_head_dim lm_head_bias
lm_head_multiplier ln_before_adapter local_attention local_attention_probs_dropout_prob local_attention_window_len
local_attn_chunk_length local_layer_ids local_num_chunks_after local_num_chunks_before log_scaling_alpha
log_scaling_n_floor logit_scale logits_mup_width_multiplier logits_scaling logits_soft_cap long_factor
low_freq_factor lru_width lsh_attention_probs_dropout_prob lsh_attn_chunk_length lsh_num_chunks_after
lsh_num_chunks_before make_ngram_vocab_size_divisible_by mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head
mamba_d_ssm mamba_d_state mamba_dt_rank mamba_expand mamba_head_dim mamba_hidden_act mamba_n_groups mamba_n_heads
mamba_ngroups mamba_norm_before_gate mamba_num_heads mamba_proj_bias mamba_rms_norm mamba_ssm_cache_dtype
mask_feature_length mask_feature_min_masks mask_feature_prob mask_index mask_time_length mask_time_min_masks
mask_time_prob mask_token_id max_inference_chunksize max_length max_patch_length max_position_embeddings max_seq_len
max_source_positions max_target_positions max_window_layers median_filter_width mem_len min_length mixer_rms_eps
mlp_alpha_factor mlp_beta_factor mlp_bias mlp_dropout mlp_gate_softcap mlp_hidden_act mlp_layer_types
mlp_multipliers mlp_only_layers mlp_up_softcap mm_tokens_per_image mode model_max_length model_type
moe_apply_router_weight_on_input moe_intermediate_size moe_k moe_latent_size moe_layer_end_index moe_layer_interval
moe_layer_start_index moe_layers moe_norm_min moe_num_experts moe_num_shared_experts moe_routed_scaling_factor
moe_router_logit_softcapping moe_shared_expert_intermediate_size moe_shared_expert_overlap moe_topk mrope_section
mscale mscale_all_dim mtp_hidden_states_first mtp_layer_types mtp_layers_block_type mtp_local_layer_ids
mtp_loss_scaling_factor mtp_mlp_layer_types multi_query mup_enabled n_ctx n_embd n_group n_groups n_head n_heads
n_inner n_langs n_layer n_layers n_layers_per_attn_res_block n_mamba_heads n_positions n_routed_experts
n_shared_experts n_special n_token n_words neftune_noise_alpha new_decoder_architecture ngram ngram_size
ngram_vocab_size_base no_bias no_repeat_ngram_size no_rope_layer_interval no_rope_layers norm_bias norm_eps
norm_epsilon norm_reduction_force_float32 norm_topk_prob norm_type num_attention_heads num_attention_heads_per_layer
num_beam_groups num_beams num_blocks num_buckets num_centroids num_channels num_chroma num_codebooks
num_decoder_attention_heads num_decoder_layers num_dense_layers num_encoder_attention_heads num_encoder_layers
num_experts num_experts_per_tok num_hashes num_heads num_hidden_layers num_image_with_embedding num_key_value_heads
num_kv_heads num_kv_shared_layers num_labels num_layers num_layers_per_stack num_ln_in_parallel_attn
num_local_experts num_logits_to_keep num_mel_bins num_mem_blocks num_mtp_layers num_nextn_predict_layers
num_random_blocks num_return_sequences num_shared_experts o_groups o_lora_rank original_max_position_embeddings
output_attentions output_embedding_size output_gate_type output_hidden_states output_logit_soft_cap
output_router_logits output_scores pad_index pad_token_id parallel_attn partial_rotary_factor patch_in_forward
patch_size patcher_config patching_batch_size patching_mode patching_threshold ple_conv_kernel_size ple_embed_dim
ple_layer_ids pooling position_bias_max_distance position_bias_num_buckets position_embedding_type pre_norm
predict_special_tokens prefix prefix_dense_intermediate_size prefix_dense_sliding_window_pattern prefix_lm
pretraining_tp problem_type projector_bias projector_hidden_act projectors_bias prompt_length prompt_mid_dim
prompt_types pronunciation_embed_dim pronunciation_vocab_size pruned_heads q_lora_rank qk_dim_factor qk_head_dim
qk_l2_clip_threshold qk_layernorm qk_nope_head_dim qk_rope_head_dim qkv_bias query_pre_attn_scalar rel_extent
rel_l2_clip_threshold relative_max_distance remove_invalid_values reorder_and_upcast_attn repetition_penalty
rescale_embeddings rescale_every rescale_prenorm_residual resid_dropout resid_pdrop residual_dropout
residual_in_fp32 residual_multiplier return_dict return_dict_in_generate return_last_states reuse_len rms_norm_eps
rms_norm_eps_moe_gate rope_interleave rope_parameters rope_scaling rope_theta rope_type rotary_dim rotary_emb_base
rotary_pct rotary_value route_scale routed_scaling_factor router_aux_loss_coef router_hidden_size
router_jitter_noise router_scaling_factor same_length scale_attention_softmax_in_fp32
scale_attn_by_inverse_layer_idx scale_attn_weights scale_depth scale_emb scale_embedding sconv_kernel_size
scoring_func seed segment_types sep_token_id sequence_kernel shape_embed_dim shape_vocab_size
share_encoder_decoder_embeddings shared_expert_combination_strategy shared_expert_intermediate_size
shared_expert_sink shared_experts_intermediate_size shared_intermediate_size short_conv_kernel_size short_factor
sinusoidal_embeddings sliding_attention sliding_window sliding_window_pattern sliding_window_size slow_but_exact
split_ngram_parts ssm_in_multiplier ssm_multipliers ssm_out_multiplier ssm_state_size start_n_top state_size
step_kernel summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type
summary_use_proj suppress_tokens swa_head_dim swa_num_attention_heads swa_num_key_value_heads swiglu_alpha
swiglu_limit task_specific_params task_type_vocab_size temperature text_config text_encoder tf_legacy_loss
tie_encoder_decoder tie_word_embeddings time_step_floor time_step_init_scheme time_step_limit time_step_max
time_step_min time_step_rank time_step_scale tokenizer_class top_k top_k_experts top_p topk_group topk_method
torch_dtype torchscript transformers_version truncate type type_vocab_size typical_p unk_index unpadded_vocab_size
unsloth_fixed unsloth_version use_associative_scan use_attention_gate use_bfloat16 use_bias
use_bidirectional_attention use_cache use_conv_bias use_double_wide_mlp use_expert_bias use_lang_emb
use_learned_position_embeddings use_long_context use_mamba_kernels use_mambapy use_mem_eff_path use_mem_rope
use_mems_eval use_mems_train use_ordered_embeddings use_parallel_residual use_post_norm use_prompt use_qk_norm
use_qkv_bias use_return_dict use_sandwich_norm use_shared_attention_adapter use_sliding_window use_task_id
use_weighted_layer_sum v_dim_factor v_head_dim video_token_id vision_config vision_end_token_id
vision_soft_tokens_per_image vision_start_token_id vocab_size vocab_size_per_layer_input vocabulary_map vq_config
w_init_variance_scale weight_mode window_size word_embed_proj_dim z_loss_coefficient zero_expert_num
"""
ADAPTER_KEYS = frozenset(_ADAPTER.split())
CONFIG_KEYS = frozenset(_CONFIG.split())
"""What the configurations of transformers' causal language models declare, and what older releases wrote beside that;
without plans for parallelism and what names files or classes."""
