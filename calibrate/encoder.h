// Layer after layer: moments, encoding, propagation. Used by calibrate.cpp alone.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <span>
#include <string>
#include <vector>

#include "calibrate/calibrate.h"
#include "calibrate/memory.h"
#include "calibrate/moments.h"
#include "calibrate/source_model.h"

namespace duet {

class CalibratedEncoder {
 public:
  // ids: whole sequences of n_ctx. Source and options must outlive this.
  CalibratedEncoder(const ConversionSource& source, std::span<const Token> ids, size_t n_ctx,
                    const CalibrationSizes& sizes, const ConvertOptions& options);

  // Indices of the source's jobs as run() delivers them: a layer after those before it, the head
  // last.
  const std::vector<size_t>& write_order() const { return order_; }
  // Delivers the tensors to a writer to which they have been declared in that order. Goes on behind the last
  // layer that an interrupted run has finished.
  void run(GgufWriter& writer);
  uint64_t state_bytes() const;  // of what the writer keeps to go on with

 private:
  // The tokens of one expert, and their router weights.
  struct Routed {
    std::vector<int32_t> tokens;
    std::vector<float> weights;
    bool stand_in = false;  // not what the router chose: an expert that saw nothing is fitted to what others saw
  };
  // Some of them: normed inputs of both streams and the difference of their residuals, [n, n_embd].
  struct ExpertChunk {
    size_t n = 0;
    std::vector<float> source, encoded, behind;
    std::span<const float> weights;
  };
  // A layer while it is being encoded.
  struct LayerState {
    int index = 0;
    Layer source, encoded;
    std::vector<std::vector<std::byte>> bytes;  // behind encoded's weights, by LayerPlace
    std::vector<Routed> routed;                 // [n_expert]
    std::vector<float> added;                   // [n_tokens, n_embd] what the experts give
  };

  void plan_order();
  void begin_streams();
  void save_state(int next_layer);
  int restore_state();  // the layer to go on with
  void pass_tensors(int next_layer);
  void run_layer(int index);
  bool fits_any(const LayerState& s, std::initializer_list<size_t> places) const;  // places: of encoder.cpp
  void encode_attention(LayerState& s);
  Moments attention_inputs(const LayerState& s) const;
  void encode_output_projection(LayerState& s);
  void route(LayerState& s, const std::vector<float>& stream) const;
  void encode_expert(LayerState& s, size_t e);
  Routed stand_in() const;
  Moments expert_inputs(const LayerState& s, size_t e) const;
  Moments hidden_inputs(const LayerState& s, size_t e, const Expert& source,
                        const Expert& encoded) const;
  template <class Body>
  void for_chunks(const LayerState& s, size_t e, const Body& body) const;
  void add_expert(LayerState& s, size_t e, const Expert& expert,
                  const std::vector<float>& stream) const;
  void run_source_experts(LayerState& s) const;
  void write_layer(const LayerState& s);
  void encode_head();

  void encode_plain(const TensorJob& job, size_t first_row, size_t n_rows, std::byte* out) const;
  std::vector<std::byte> encoded_plainly(const TensorJob& job) const;
  void encode(const TensorJob& job, size_t expert, Moments& moments,
              std::vector<std::byte>& out) const;
  void finish_tensor(size_t job, std::span<const std::byte> bytes);
  void count_tokens(const LayerState& s);
  void report_few() const;
  void show(const std::string& what);
  void check_cancel() const;
  size_t n_tokens() const { return ids_.size(); }
  size_t moment_cols(size_t n_cols) const { return std::min(n_cols, sizes_.moment_cols); }
  // Calls body(first, n) for pieces of [0, n_rows).
  template <class Body>
  void in_chunks(size_t n_rows, const Body& body) const {
    for (size_t t = 0; t < n_rows; t += sizes_.chunk_tokens)
      body(t, std::min(sizes_.chunk_tokens, n_rows - t));
  }

  const ConversionSource& source_;
  const HParams& hparams_;
  SourceModel model_;
  std::span<const Token> ids_;
  size_t n_ctx_, n_embd_;
  CalibrationSizes sizes_;
  const ConvertOptions& options_;
  GgufWriter* writer_ = nullptr;  // during run()
  std::vector<float> rope_factors_;
  LayerEval eval_;
  std::vector<size_t> order_;
  std::vector<float> source_stream_, encoded_stream_;  // [n_tokens, n_embd] residuals
  size_t n_few_ = 0, n_unseen_ = 0;                    // experts that saw few tokens, none
  ConvertProgress progress_;
};

}  // namespace duet
