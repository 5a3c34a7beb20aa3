// The model of a node of edgellm_ros, for AskModel.

#ifndef EDGELLM_BT__ROS_MODEL_HPP_
#define EDGELLM_BT__ROS_MODEL_HPP_

#include <memory>
#include <string>

#include "behaviortree_cpp/bt_factory.h"
#include "edgellm_bt/ask_model.hpp"
#include "edgellm_cpp/client.hpp"
#include "rclcpp/rclcpp.hpp"

namespace edgellm_bt
{

// Asks the node `name`. Its callbacks run in poll(), in the thread that ticks the tree: nothing else has to spin them.
class RosModel : public Model
{
public:
  explicit RosModel(const rclcpp::Node::SharedPtr & node, const std::string & name = "/llm");

  std::unique_ptr<PendingAnswer> ask(const Question & question) override;

private:
  rclcpp::CallbackGroup::SharedPtr group_;
  std::shared_ptr<rclcpp::executors::SingleThreadedExecutor> executor_;
  std::shared_ptr<edgellm_cpp::Client> client_;
  std::string name_;
};

// Register AskModel for trees of `factory`, which asks the node `name` by `node`.
void register_nodes(
  BT::BehaviorTreeFactory & factory, const rclcpp::Node::SharedPtr & node, const std::string & name = "/llm");

}  // namespace edgellm_bt

#endif  // EDGELLM_BT__ROS_MODEL_HPP_
