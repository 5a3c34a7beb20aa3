#include "edgellm_bt/ask_model.hpp"

#include <sstream>
#include <utility>

namespace edgellm_bt
{

namespace
{

std::vector<std::string> split(const std::string & text)
{
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ';'); ) {
    if (!part.empty()) {
      parts.push_back(part);
    }
  }
  return parts;
}

}  // namespace

AskModel::AskModel(const std::string & name, const BT::NodeConfig & config, std::shared_ptr<Model> model)
: BT::StatefulActionNode(name, config), model_(std::move(model)) {}

BT::PortsList AskModel::providedPorts()
{
  return {
    BT::InputPort<std::string>("question", "what the model is asked"),
    BT::InputPort<std::string>("system", "", "the system message"),
    BT::InputPort<std::string>("choices", "", "the answer is one of these, with ; between them"),
    BT::InputPort<std::string>("json_schema", "", "the answer is a JSON value of this schema"),
    BT::InputPort<std::string>("regex", "", "the answer is matched by this"),
    BT::InputPort<std::string>("session", "", "conversation that the node keeps"),
    BT::InputPort<double>("deadline", 0.0, "s; 0 = the node's"),
    BT::InputPort<unsigned>("max_new_tokens", 0, "0 = the node's"),
    BT::OutputPort<std::string>("answer", "the text of the whole answer"),
    BT::OutputPort<std::string>("error", "why there is none"),
  };
}

BT::NodeStatus AskModel::onStart()
{
  const auto text = getInput<std::string>("question");
  if (!text) {
    throw BT::RuntimeError("AskModel has no question: ", text.error());
  }
  Question question;
  question.text = text.value();
  question.system = getInput<std::string>("system").value_or("");
  question.choices = split(getInput<std::string>("choices").value_or(""));
  question.json_schema = getInput<std::string>("json_schema").value_or("");
  question.regex = getInput<std::string>("regex").value_or("");
  question.session = getInput<std::string>("session").value_or("");
  question.deadline = getInput<double>("deadline").value_or(0.0);
  question.max_new_tokens = getInput<unsigned>("max_new_tokens").value_or(0);
  pending_ = model_->ask(question);
  return onRunning();
}

BT::NodeStatus AskModel::onRunning()
{
  const std::optional<Outcome> outcome = pending_->poll();
  if (!outcome) {
    return BT::NodeStatus::RUNNING;
  }
  pending_.reset();
  if (!outcome->error.empty()) {
    setOutput("error", outcome->error);
    return BT::NodeStatus::FAILURE;
  }
  setOutput("answer", outcome->text);
  return BT::NodeStatus::SUCCESS;
}

void AskModel::onHalted()
{
  if (pending_) {
    pending_->cancel();
    pending_.reset();
  }
}

}  // namespace edgellm_bt
