// AskModel as a plugin: the ROS node is the blackboard's entry "node", the model's node its entry "llm", or /llm.

#include <memory>
#include <string>

#include "behaviortree_cpp/bt_factory.h"
#include "edgellm_bt/ros_model.hpp"

BT_REGISTER_NODES(factory)
{
  factory.registerBuilder<edgellm_bt::AskModel>(
    "AskModel", [](const std::string & id, const BT::NodeConfig & config) {
      const auto node = config.blackboard->get<rclcpp::Node::SharedPtr>("node");
      std::string name = "/llm";
      (void)config.blackboard->get("llm", name);
      return std::make_unique<edgellm_bt::AskModel>(
        id, config, std::make_shared<edgellm_bt::RosModel>(node, name));
    });
}
