// AskModel in trees, with a model that answers as the test says. It needs no ROS.

#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "behaviortree_cpp/bt_factory.h"
#include "edgellm_bt/ask_model.hpp"

#define CHECK(condition) \
  if (!(condition)) { \
    std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << std::endl; \
    std::exit(1); \
  }

using edgellm_bt::Outcome;
using edgellm_bt::Question;
using BT::NodeStatus;

struct FakeModel : edgellm_bt::Model
{
  struct Answer : edgellm_bt::PendingAnswer
  {
    explicit Answer(FakeModel & model)
    : model(model) {}
    std::optional<Outcome> poll() override
    {
      ++model.polls;
      return model.polls > model.delay ? std::optional<Outcome>(model.outcome) : std::nullopt;
    }
    void cancel() override {++model.cancels;}
    FakeModel & model;
  };

  std::unique_ptr<edgellm_bt::PendingAnswer> ask(const Question & question) override
  {
    questions.push_back(question);
    polls = 0;
    return std::make_unique<Answer>(*this);
  }

  std::vector<Question> questions;
  Outcome outcome;
  int delay = 0;  // polls without an outcome
  int polls = 0;
  int cancels = 0;
};

struct Setting
{
  Setting()
  {
    factory.registerBuilder<edgellm_bt::AskModel>(
      "AskModel", [this](const std::string & name, const BT::NodeConfig & config) {
        return std::make_unique<edgellm_bt::AskModel>(name, config, model);
      });
  }

  BT::Tree tree(const std::string & inside)
  {
    return factory.createTreeFromText(
      R"(<root BTCPP_format="4"><BehaviorTree ID="T">)" + inside + "</BehaviorTree></root>", blackboard);
  }

  std::string entry(const std::string & key)
  {
    std::string value;
    (void)blackboard->get(key, value);
    return value;
  }

  std::shared_ptr<FakeModel> model = std::make_shared<FakeModel>();
  BT::Blackboard::Ptr blackboard = BT::Blackboard::create();
  BT::BehaviorTreeFactory factory;
};

void test_it_runs_until_there_is_an_answer()
{
  Setting setting;
  setting.model->delay = 2;
  setting.model->outcome = {"pick it up", ""};
  setting.blackboard->set("what", std::string("a cup fell"));
  BT::Tree tree = setting.tree(
    R"(<AskModel question="{what}" system="You are a robot." choices="pick it up;ask a person" regex="" session="s"
       deadline="2.5" max_new_tokens="20" answer="{said}" error="{wrong}"/>)");
  CHECK(tree.tickExactlyOnce() == NodeStatus::RUNNING);
  CHECK(tree.tickExactlyOnce() == NodeStatus::RUNNING);
  CHECK(tree.tickExactlyOnce() == NodeStatus::SUCCESS);
  CHECK(setting.entry("said") == "pick it up" && setting.entry("wrong").empty());
  CHECK(setting.model->questions.size() == 1 && setting.model->cancels == 0);
  const Question & asked = setting.model->questions[0];
  CHECK(asked.text == "a cup fell" && asked.system == "You are a robot." && asked.session == "s");
  CHECK((asked.choices == std::vector<std::string>{"pick it up", "ask a person"}));
  CHECK(asked.deadline == 2.5 && asked.max_new_tokens == 20);
}

void test_what_is_left_out_is_left_to_the_node()
{
  Setting setting;
  setting.model->outcome = {"hello", ""};
  BT::Tree tree = setting.tree(R"(<AskModel question="hi" answer="{said}"/>)");
  CHECK(tree.tickExactlyOnce() == NodeStatus::SUCCESS);
  const Question & asked = setting.model->questions[0];
  CHECK(asked.system.empty() && asked.choices.empty() && asked.json_schema.empty() && asked.regex.empty());
  CHECK(asked.deadline == 0.0 && asked.max_new_tokens == 0);
}

void test_no_whole_answer_is_a_failure_that_a_fallback_takes_over()
{
  Setting setting;
  setting.model->outcome = {"", "The queue is full."};
  BT::Tree tree = setting.tree(
    R"(<Fallback><AskModel question="hi" answer="{said}" error="{wrong}"/><AlwaysSuccess/></Fallback>)");
  CHECK(tree.tickExactlyOnce() == NodeStatus::SUCCESS);
  CHECK(setting.entry("wrong") == "The queue is full." && setting.entry("said").empty());
}

void test_a_tree_that_goes_elsewhere_cancels_and_may_ask_again()
{
  Setting setting;
  setting.model->delay = 3;
  setting.model->outcome = {"late", ""};
  BT::Tree tree = setting.tree(R"(<AskModel question="hi" answer="{said}"/>)");
  CHECK(tree.tickExactlyOnce() == NodeStatus::RUNNING);
  tree.haltTree();
  CHECK(setting.model->cancels == 1 && setting.entry("said").empty());
  setting.model->delay = 0;
  CHECK(tree.tickExactlyOnce() == NodeStatus::SUCCESS);
  CHECK(setting.model->questions.size() == 2 && setting.model->cancels == 1 && setting.entry("said") == "late");
}

void test_a_tree_without_a_question_says_so()
{
  Setting setting;
  BT::Tree tree = setting.tree(R"(<AskModel question="{nothing}" answer="{said}"/>)");
  bool was_thrown = false;
  try {
    tree.tickExactlyOnce();
  } catch (const std::exception & error) {
    was_thrown = std::string(error.what()).find("no question") != std::string::npos;
  }
  CHECK(was_thrown && setting.model->questions.empty());
}

void test_the_tree_of_this_package_decides()
{
  Setting setting;
  setting.model->delay = 1;
  setting.model->outcome = {"ask a person", ""};
  setting.blackboard->set("situation", std::string("a cup fell"));
  BT::Tree tree = setting.factory.createTreeFromFile(TREES "/decide.xml", setting.blackboard);
  CHECK(tree.tickExactlyOnce() == NodeStatus::RUNNING);
  CHECK(tree.tickExactlyOnce() == NodeStatus::SUCCESS);
  CHECK(setting.entry("decision") == "ask a person" && setting.model->questions[0].choices.size() == 3);
}

int main()
{
  test_the_tree_of_this_package_decides();
  test_it_runs_until_there_is_an_answer();
  test_what_is_left_out_is_left_to_the_node();
  test_no_whole_answer_is_a_failure_that_a_fallback_takes_over();
  test_a_tree_that_goes_elsewhere_cancels_and_may_ask_again();
  test_a_tree_without_a_question_says_so();
  std::cout << "6 tests passed" << std::endl;
  return 0;
}
