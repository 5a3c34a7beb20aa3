// Runs a tree with AskModel:  run_tree [--tree FILE] [--node /llm] SITUATION …

#include <chrono>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "ament_index_cpp/get_package_share_directory.hpp"
#include "edgellm_bt/ros_model.hpp"

int main(int argc, char ** argv)
{
  rclcpp::init(argc, argv);
  const std::vector<std::string> words = rclcpp::remove_ros_arguments(argc, argv);
  std::string name = "/llm", file, situation;
  for (std::size_t i = 1; i < words.size(); ++i) {
    if (words[i] == "--node" && i + 1 < words.size()) {
      name = words[++i];
    } else if (words[i] == "--tree" && i + 1 < words.size()) {
      file = words[++i];
    } else {
      situation += (situation.empty() ? "" : " ") + words[i];
    }
  }
  if (file.empty()) {
    file = ament_index_cpp::get_package_share_directory("edgellm_bt") + "/trees/decide.xml";
  }
  const auto node = std::make_shared<rclcpp::Node>("run_tree");
  BT::BehaviorTreeFactory factory;
  edgellm_bt::register_nodes(factory, node, name);
  const auto blackboard = BT::Blackboard::create();
  blackboard->set("situation", situation);
  BT::Tree tree = factory.createTreeFromFile(file, blackboard);
  BT::NodeStatus status = BT::NodeStatus::RUNNING;
  while (rclcpp::ok() && status == BT::NodeStatus::RUNNING) {
    status = tree.tickOnce();
    tree.sleep(std::chrono::milliseconds(20));
  }
  tree.haltTree();
  std::string decision;
  (void)blackboard->get("decision", decision);
  std::cout << BT::toStr(status) << ": " << decision << std::endl;
  rclcpp::shutdown();
  return status == BT::NodeStatus::SUCCESS ? 0 : 1;
}
