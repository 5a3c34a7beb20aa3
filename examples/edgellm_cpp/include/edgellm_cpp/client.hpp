// A client of the node of edgellm_ros: answers with their pieces, by its action ~/generate.
//
//   edgellm_cpp::Client llm(node, "/llm");
//   edgellm_cpp::Request request = edgellm_cpp::Client::question("bring me the red cup");
//   auto call = llm.ask(request, [](const std::string & piece) {std::cout << piece << std::flush;});
//
// An executor has to spin the node, or the callback group that the client was given; callbacks come from there.

#ifndef EDGELLM_CPP__CLIENT_HPP_
#define EDGELLM_CPP__CLIENT_HPP_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "edgellm_ros/action/generate.hpp"
#include "edgellm_ros/msg/chat_message.hpp"
#include "edgellm_ros/msg/error_code.hpp"
#include "edgellm_ros/msg/finish_reason.hpp"
#include "edgellm_ros/msg/generation_request.hpp"
#include "edgellm_ros/msg/generation_result.hpp"
#include "rclcpp/rclcpp.hpp"
#include "rclcpp_action/rclcpp_action.hpp"

namespace edgellm_cpp
{

using Action = edgellm_ros::action::Generate;
using Request = edgellm_ros::msg::GenerationRequest;
using Result = edgellm_ros::msg::GenerationResult;
using OnPiece = std::function<void (const std::string & text)>;

// One request on its way. Every method may be called from any thread.
class Call
{
public:
  // The result, once there is one. What could not be sent has an error_code, too.
  std::optional<Result> result() const
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    return result_;
  }

  // The text that has come so far.
  std::string text() const
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    return text_;
  }

  // Whether the answer has ended by itself and is not cut: what a form was asked for has it.
  static bool is_whole(const Result & result)
  {
    using edgellm_ros::msg::FinishReason;
    return result.error_code == edgellm_ros::msg::ErrorCode::NONE &&
           (result.finish_reason == FinishReason::STOP || result.finish_reason == FinishReason::TOOL_CALLS);
  }

  // Whether the node has accepted or refused it. A cancel before that is sent with the acceptance.
  bool is_settled() const
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    return handle_ || result_;
  }

  // End the request within one token; the result has what there was.
  void cancel()
  {
    GoalHandle::SharedPtr handle;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_cancelled_ = true;
      handle = result_ ? nullptr : handle_;
    }
    if (handle) {
      cancel(handle);
    }
  }

private:
  friend class Client;
  using GoalHandle = rclcpp_action::ClientGoalHandle<Action>;

  Call(rclcpp_action::Client<Action>::SharedPtr client, OnPiece on_piece)
  : client_(std::move(client)), on_piece_(std::move(on_piece)) {}

  void cancel(const GoalHandle::SharedPtr & handle)
  {
    try {
      client_->async_cancel_goal(handle);
    } catch (const rclcpp_action::exceptions::UnknownGoalHandleError &) {
      // It has ended meanwhile.
    }
  }

  void on_accepted(const GoalHandle::SharedPtr & handle)
  {
    if (!handle) {
      fail(edgellm_ros::msg::ErrorCode::NOT_ACTIVE, "The node is not active; configure and activate it.");
      return;
    }
    bool is_cancelled = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      handle_ = handle;
      is_cancelled = is_cancelled_;
    }
    if (is_cancelled) {  // before it was accepted
      cancel(handle);
    }
  }

  // DDS may drop feedback when a reader is slow: from the first gap on, the rest of the text is taken from the result.
  void on_feedback(const Action::Feedback & feedback)
  {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      has_gap_ = has_gap_ || feedback.sequence != expected_;
      expected_ = feedback.sequence + 1;
      if (has_gap_ || result_) {
        return;
      }
      text_ += feedback.text;
    }
    if (on_piece_ && !feedback.text.empty()) {
      on_piece_(feedback.text);
    }
  }

  void on_result(const Result & result)
  {
    std::string rest;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      rest = result.text.size() > text_.size() ? result.text.substr(text_.size()) : "";
      text_ += rest;
    }
    if (on_piece_ && !rest.empty()) {
      on_piece_(rest);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    result_ = result;
  }

  void fail(uint16_t code, const std::string & message)
  {
    Result result;
    result.error_code = code;
    result.error_message = message;
    result.finish_reason = edgellm_ros::msg::FinishReason::ERROR;
    on_result(result);
  }

  rclcpp_action::Client<Action>::SharedPtr client_;
  OnPiece on_piece_;
  mutable std::mutex mutex_;  // of what follows
  GoalHandle::SharedPtr handle_;
  std::string text_;
  std::optional<Result> result_;
  uint32_t expected_ = 0;
  bool has_gap_ = false;
  bool is_cancelled_ = false;
};

class Client
{
public:
  // name: of the node, fully qualified. group: that of the callbacks; nullptr = the node's own.
  explicit Client(
    const rclcpp::Node::SharedPtr & node, const std::string & name = "/llm",
    const rclcpp::CallbackGroup::SharedPtr & group = nullptr)
  : action_(rclcpp_action::create_client<Action>(node, name + "/generate", group)) {}

  // Whether the node offers the action within timeout.
  bool wait(std::chrono::nanoseconds timeout) const {return action_->wait_for_action_server(timeout);}

  // Whether the node offers the action now.
  bool is_ready() const {return action_->action_server_is_ready();}

  // A request that is one message of a user.
  static Request question(const std::string & text)
  {
    Request request;
    edgellm_ros::msg::ChatMessage message;
    message.role = "user";
    message.content = text;
    request.messages.push_back(message);
    return request;
  }

  // Send a request. on_piece gets the text as it comes; the pieces, joined, are the result's text.
  std::shared_ptr<Call> ask(const Request & request, OnPiece on_piece = nullptr)
  {
    const std::shared_ptr<Call> call(new Call(action_, std::move(on_piece)));
    rclcpp_action::Client<Action>::SendGoalOptions options;
    options.goal_response_callback = [call](const Call::GoalHandle::SharedPtr & handle) {call->on_accepted(handle);};
    options.feedback_callback =
      [call](Call::GoalHandle::SharedPtr, const std::shared_ptr<const Action::Feedback> feedback) {
        call->on_feedback(*feedback);
      };
    options.result_callback =
      [call](const Call::GoalHandle::WrappedResult & wrapped) {
        if (wrapped.result) {
          call->on_result(wrapped.result->result);
        } else {
          call->fail(edgellm_ros::msg::ErrorCode::INTERNAL, "The answer was lost.");
        }
      };
    Action::Goal goal;
    goal.request = request;
    action_->async_send_goal(goal, options);
    return call;
  }

private:
  rclcpp_action::Client<Action>::SharedPtr action_;
};

}  // namespace edgellm_cpp

#endif  // EDGELLM_CPP__CLIENT_HPP_
