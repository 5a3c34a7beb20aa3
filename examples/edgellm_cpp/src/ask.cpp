// Asks the node and prints the answer as it comes:  ask [--node /llm] [--choices a,b] TEXT …
// Ctrl-C cancels the request and prints nothing more.

#include <atomic>
#include <chrono>
#include <csignal>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "edgellm_cpp/client.hpp"

namespace
{
std::atomic<bool> is_interrupted{false};
}

int main(int argc, char ** argv)
{
  // Ctrl-C still has to cancel the request.
  rclcpp::init(argc, argv, rclcpp::InitOptions(), rclcpp::SignalHandlerOptions::None);
  std::signal(SIGINT, [](int) {is_interrupted = true;});
  const std::vector<std::string> words = rclcpp::remove_ros_arguments(argc, argv);
  std::string name = "/llm", text;
  edgellm_cpp::Request request;
  for (std::size_t i = 1; i < words.size(); ++i) {
    if (words[i] == "--node" && i + 1 < words.size()) {
      name = words[++i];
    } else if (words[i] == "--choices" && i + 1 < words.size()) {
      std::istringstream choices(words[++i]);
      for (std::string choice; std::getline(choices, choice, ','); ) {
        request.choices.push_back(choice);
      }
    } else {
      text += (text.empty() ? "" : " ") + words[i];
    }
  }
  request.messages = edgellm_cpp::Client::question(text).messages;
  request.deadline = 60.0;  // s

  const auto node = std::make_shared<rclcpp::Node>("ask");
  edgellm_cpp::Client llm(node, name);
  if (!llm.wait(std::chrono::seconds(5))) {
    std::cerr << "No node offers " << name << "/generate; start it, or give another name." << std::endl;
    return 1;
  }
  const auto call = llm.ask(request, [](const std::string & piece) {std::cout << piece << std::flush;});
  rclcpp::executors::SingleThreadedExecutor executor;
  executor.add_node(node);
  bool was_cancelled = false;
  while (rclcpp::ok() && !call->result()) {
    if (is_interrupted && !was_cancelled) {
      call->cancel();
      was_cancelled = true;
    }
    if (!llm.is_ready()) {
      std::cerr << "\nThe node that offered " << name << "/generate is gone." << std::endl;
      return 1;
    }
    executor.spin_once(std::chrono::milliseconds(100));
  }
  std::cout << std::endl;
  const auto result = call->result();
  rclcpp::shutdown();
  if (result && result->error_code != edgellm_ros::msg::ErrorCode::NONE) {
    std::cerr << result->error_message << std::endl;
    return 1;
  }
  return was_cancelled ? 130 : 0;
}
