#include "edgellm_bt/ros_model.hpp"

#include <chrono>
#include <utility>

namespace edgellm_bt
{

namespace
{

using Executor = rclcpp::executors::SingleThreadedExecutor;

constexpr auto kDiscovery = std::chrono::seconds(2);
constexpr auto kAcceptance = std::chrono::milliseconds(500);

edgellm_cpp::Request to_request(const Question & question)
{
  edgellm_cpp::Request request = edgellm_cpp::Client::question(question.text);
  if (!question.system.empty()) {
    edgellm_ros::msg::ChatMessage system;
    system.role = "system";
    system.content = question.system;
    request.messages.insert(request.messages.begin(), system);
  }
  request.choices = question.choices;
  request.json_schema = question.json_schema;
  request.regex = question.regex;
  request.session = question.session;
  request.deadline = question.deadline;
  if (question.max_new_tokens > 0) {
    request.sampling.max_new_tokens.push_back(question.max_new_tokens);
  }
  return request;
}

// Sent as soon as the node is found, which may take a moment after the tree has started.
class RosAnswer : public PendingAnswer
{
public:
  RosAnswer(
    std::shared_ptr<Executor> executor, std::shared_ptr<edgellm_cpp::Client> client, const Question & question,
    const std::string & name)
  : executor_(std::move(executor)), client_(std::move(client)), request_(to_request(question)), name_(name) {}

  std::optional<Outcome> poll() override
  {
    if (!client_->is_ready()) {
      if (call_) {
        return Outcome{"", "The node that offered " + name_ + "/generate is gone."};
      }
      if (std::chrono::steady_clock::now() > begin_ + kDiscovery) {
        return Outcome{"", "No node offers " + name_ + "/generate; start it, or give another name."};
      }
      return std::nullopt;
    }
    if (!call_) {
      call_ = client_->ask(request_);
    }
    executor_->spin_some();
    const auto result = call_->result();
    if (!result) {
      return std::nullopt;
    }
    if (edgellm_cpp::Call::is_whole(*result)) {
      return Outcome{result->text, ""};
    }
    if (!result->error_message.empty()) {
      return Outcome{"", result->error_message};
    }
    return Outcome{"", "The answer is not whole (finish reason " + std::to_string(result->finish_reason) + ")."};
  }

  void cancel() override
  {
    if (!call_) {
      return;
    }
    call_->cancel();
    // Nobody polls any more, so the acceptance is waited for here: without it there is nothing to cancel.
    const auto end = std::chrono::steady_clock::now() + kAcceptance;
    while (!call_->is_settled() && std::chrono::steady_clock::now() < end) {
      executor_->spin_once(std::chrono::milliseconds(10));
    }
  }

private:
  std::shared_ptr<Executor> executor_;
  std::shared_ptr<edgellm_cpp::Client> client_;
  edgellm_cpp::Request request_;
  std::string name_;
  std::shared_ptr<edgellm_cpp::Call> call_;
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace

RosModel::RosModel(const rclcpp::Node::SharedPtr & node, const std::string & name)
: group_(node->create_callback_group(rclcpp::CallbackGroupType::MutuallyExclusive, false)),
  executor_(std::make_shared<Executor>()), name_(name)
{
  executor_->add_callback_group(group_, node->get_node_base_interface());
  client_ = std::make_shared<edgellm_cpp::Client>(node, name, group_);
}

std::unique_ptr<PendingAnswer> RosModel::ask(const Question & question)
{
  return std::make_unique<RosAnswer>(executor_, client_, question, name_);
}

void register_nodes(
  BT::BehaviorTreeFactory & factory, const rclcpp::Node::SharedPtr & node, const std::string & name)
{
  const auto model = std::make_shared<RosModel>(node, name);
  factory.registerBuilder<AskModel>(
    "AskModel", [model](const std::string & id, const BT::NodeConfig & config) {
      return std::make_unique<AskModel>(id, config, model);
    });
}

}  // namespace edgellm_bt
