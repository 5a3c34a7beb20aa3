// AskModel: a node of a behaviour tree that asks a language model. What asks it is behind Model, so that nothing here
// needs ROS.

#ifndef EDGELLM_BT__ASK_MODEL_HPP_
#define EDGELLM_BT__ASK_MODEL_HPP_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "behaviortree_cpp/action_node.h"

namespace edgellm_bt
{

// What is asked. Empty texts and zeros are left to the node of edgellm_ros.
struct Question
{
  std::string text;
  std::string system;
  std::vector<std::string> choices;  // the answer is one of these
  std::string json_schema;           // … or a JSON value of this schema
  std::string regex;                 // … or a text that this matches
  std::string session;
  double deadline = 0.0;  // s
  uint32_t max_new_tokens = 0;
};

struct Outcome
{
  std::string text;   // of the whole answer
  std::string error;  // one sentence, if there is no whole answer
};

// A question on its way. Used by the thread that ticks the tree.
class PendingAnswer
{
public:
  virtual ~PendingAnswer() = default;
  // The outcome, once there is one. Called at every tick; it does not wait.
  virtual std::optional<Outcome> poll() = 0;
  // Nobody waits for the answer any more.
  virtual void cancel() = 0;
};

class Model
{
public:
  virtual ~Model() = default;
  virtual std::unique_ptr<PendingAnswer> ask(const Question & question) = 0;
};

// RUNNING while the model answers, SUCCESS with {answer}, FAILURE with {error}. Halted, it cancels the question.
class AskModel : public BT::StatefulActionNode
{
public:
  AskModel(const std::string & name, const BT::NodeConfig & config, std::shared_ptr<Model> model);

  static BT::PortsList providedPorts();

  BT::NodeStatus onStart() override;
  BT::NodeStatus onRunning() override;
  void onHalted() override;

private:
  std::shared_ptr<Model> model_;
  std::unique_ptr<PendingAnswer> pending_;
};

}  // namespace edgellm_bt

#endif  // EDGELLM_BT__ASK_MODEL_HPP_
